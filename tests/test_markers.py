"""Every test is either a unit or an integration test, and the list of the latter names tests that exist."""

import pytest

from helpers.markers import INTEGRATION_TESTS, TESTS


def test_every_test_is_either_unit_or_integration(request):
    for item in request.session.items:
        markers = {marker.name for marker in item.iter_markers()}
        assert len(markers & {'unit', 'integration'}) == 1, item.nodeid
        assert 'integration' in markers or not markers & {'slow', 'gpu'}, item.nodeid


@pytest.mark.parametrize('entry', sorted(INTEGRATION_TESTS))
def test_listed_integration_tests_exist(entry):
    file, _, name = entry.partition('::')
    assert f'def {name}(' in (TESTS / file).read_text() if name else (TESTS / file).is_file()
