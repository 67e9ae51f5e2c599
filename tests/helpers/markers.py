"""Which tests are integration tests; all others are unit tests. An explicit marker at a test wins."""

import pytest

from helpers.paths import ROOT

TESTS = ROOT / 'tests'
# Fixtures that start processes or export models.
INTEGRATION_FIXTURES = {'run_tool', 'start_tool', 'run_on_gpu', 'files', 'exported'}
# Modules, and tests in them, that start processes themselves, train, or take seconds.
INTEGRATION_TESTS = {
    'checkpoints/test_exported_files.py',
    'checkpoints/test_foreign_models.py',
    'checkpoints/test_unsafe_checkpoints.py::test_zip_bomb_is_refused',
    'checkpoints/test_unsafe_checkpoints.py::test_mutated_files_are_refused_or_read',
    'checkpoints/test_weight_naming.py::test_damaged_files_are_refused_or_load_correctly',
    'checkpoints/test_weight_naming.py::test_every_damaged_tensor_is_refused',
    'checkpoints/test_weight_naming.py::test_processes_download_once',
    'cli/test_exit.py::test_python_without_torch_is_a_one_line_error',
    'cli/test_exit.py::test_closed_pipe_ends_silently',
    'cli/test_exit.py::test_training_continues_after_pipe_closes',
    'config/test_batch_size.py::test_scaled_schedule_of_a_segmentor_has_the_papers_lr_curve',
    'config/test_batch_size.py::test_accumulated_runs_end_with_equal_weights',
    'config/test_resume_settings.py::test_override_equals_run_with_these_settings_from_start',
    'datasets/test_channel_training.py',
    'datasets/test_channels.py::test_a_config_takes_the_channels',
    'datasets/test_channels.py::test_pretrained_swin_takes_rgb_alone',
    'datasets/test_data_checks.py',
    'datasets/test_data_layouts.py',
    'datasets/test_fields.py::test_training_with_text_ids',
    'datasets/test_files.py',
    'datasets/test_fuzz.py',
    'datasets/test_find_masks.py::test_given_folders_train',
    'datasets/test_image_sizes.py::test_training_with_thin_images',
    'datasets/test_instance_masks.py::test_cityscapes',
    'datasets/test_instance_masks.py::test_mask_rcnn_trains',
    'datasets/test_mask_encodings.py::test_a_training_reads_converted_masks',
    'datasets/test_mask_encodings.py::test_known_palettes_are_tables',
    'datasets/test_voc.py::test_training_starts_from_xml_files',
    'datasets/test_yolo.py::test_training_starts_from_a_data_yaml',
    'docs/test_export_page.py',
    'engine/test_distributed.py',
    'engine/test_failures.py',
    'engine/test_training_aids.py',
    'engine/test_lr_finder.py::test_lr_rises_exponentially_with_constant_multipliers',
    'engine/test_lr_finder.py::test_sweeps_with_equal_seeds_are_equal',
    'engine/test_mixed_images.py::test_killed_runs_end_as_uninterrupted_ones',
    'engine/test_multi_node.py',
    'engine/test_resume.py',
    'evaluation/test_detection_report.py::test_boxes_without_masks_and_no_detections',
    'evaluation/test_detection_report.py::test_metric_writes_its_report',
    'evaluation/test_report_option.py::test_test_tool_writes_a_report',
    'export/test_detector.py::test_module_equals_mmdet',
    'export/test_detector.py::test_raw_inputs_and_box_masks',
    'export/test_detector.py::test_soft_nms_in_files',
    'export/test_mask2former_instances.py::test_exported_file_equals_mmdet',
    'export/test_one_stage.py::test_ceiling_is_that_of_float64',
    'export/test_one_stage.py::test_exported_file_equals_mmdet',
    'export/test_one_stage.py::test_module_equals_mmdet',
    'export/test_other_channels.py',
    'export/test_query_based.py::test_exported_file_equals_mmdet',
    'export/test_query_based.py::test_module_equals_mmdet',
    'export/test_segmentor.py::test_equals_mmseg',
    'export/test_segmentor.py::test_exported_file_equals_mmseg_at_every_size',
    'export/test_segmentor.py::test_exported_file_has_only_standard_operators',
    'export/test_segmentor.py::test_program_equals_mmseg_at_every_size',
    'inference/test_channel_prediction.py::test_permuted_channels_and_stem_give_the_same',
    'inference/test_checkpoint_config.py',
    'export/test_swin.py::test_exported_file_equals_the_model',
    'export/test_used_as_checkpoints.py',
    'inference/test_dataset_pictures.py::test_tool_draws_a_dataset',
    'inference/test_exported.py',
    'inference/test_exported_tools.py',
    'inference/test_openmmlab.py',
    'inference/test_predict_tool.py',
    'inference/test_python_api.py',
    'inference/test_tiles_of_files.py',
    'inference/test_tiling.py::test_tiled_detections_equal_untiled_ones',
    'models/test_convnext.py::test_export_with_dynamic_size',
    'models/test_fp32_heads.py::test_proposals_equal_fp32',
    'models/test_multiscale_tta.py::test_memory_does_not_grow_with_the_number_of_views',
    'ops/test_box_ops.py::test_opcheck',
    'ops/test_cpu_ops.py::test_compiled_blocks_compile_once_for_all_sizes_and_drop_rates',
    'ops/test_cpu_ops.py::test_gradients_are_deterministic',
    'ops/test_cpu_ops.py::test_grn_with_a_recomputed_hidden_layer',
    'ops/test_cpu_ops.py::test_import_does_not_load_mmdet_mmseg_or_torchvision',
    'ops/test_kernel_memory.py',
    'ops/test_module_calls.py',
    'ops/test_operators.py::test_opcheck_of_blocks',
    'ops/test_operators.py::test_opcheck_of_gradients_of_blocks',
    'ops/test_operators.py::test_opcheck_of_stages',
    'ops/test_operators.py::test_fake_tensors_tracing_and_export_use_the_reference_implementation',
    'ops/test_triton_blocks.py::test_outputs_and_gradients_equal_the_module',
    'paper/test_baselines.py::test_counts_equal_published_values',
    'paper/test_baselines.py::test_demo_trains',
    'paper/test_curves.py::test_layer_lrs_equal_optimizer_lrs',
    'paper/test_dino.py::test_counts',
    'paper/test_dino.py::test_demo_trains',
    'paper/test_flops.py::test_nothing_is_allocated',
    'paper/test_later_results.py::test_counts_equal_published_values',
    'paper/test_later_results.py::test_rtmdet_trains_a_step',
    'paper/test_mask2former.py::test_demo_trains',
    'paper/test_pipelines.py',
    'paper/test_recipes.py::test_every_config_builds',
    'test_package.py',
    'test_platforms.py',
}


def is_integration(item: pytest.Item) -> bool:
    """Whether a test starts processes, trains or takes long, by its fixtures, its markers and the list above."""
    module = item.path.relative_to(TESTS).as_posix()
    return (
        not INTEGRATION_TESTS.isdisjoint({module, f'{module}::{item.originalname}'})
        or not INTEGRATION_FIXTURES.isdisjoint(item.fixturenames)
        or any(item.iter_markers('slow'))
        or any(item.iter_markers('gpu'))
    )
