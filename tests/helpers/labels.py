"""Segmentation masks with a given set of labels."""

from convnext_dense.datasets.custom import DatasetRequest, read_data


def found(root, **request):
    data = read_data(DatasetRequest(str(root), **request), 'segmentation', ('train', 'val'))
    return data, {f.code: f for f in data.report.diagnostics.values()}
