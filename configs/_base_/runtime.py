"""What every recipe shares."""

custom_imports = dict(imports=['convnext_dense'], allow_failed_imports=False)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
log_level = 'INFO'
load_from = None
resume = False
