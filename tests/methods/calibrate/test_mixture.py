"""Mixtures: counts by weight that add up, windows of each source, and sources that would give none."""

import pytest

from qtool.errors import QtoolError
from qtool.methods.calibrate.mixture import METHOD, MixtureOptions, counts_of, mixture
from qtool.model.handle import ModelHandle
from qtool.options import ModelOptions

CODE, PROSE = {"source": "demo:calibration"}, {"source": "demo:validation"}


@pytest.mark.parametrize(
    ("weights", "samples", "counts"),
    [((1, 1), 8, [4, 4]), ((2, 1, 1), 10, [5, 3, 2]), ((1, 1, 1), 8, [3, 3, 2]), ((0.5, 99.5), 10, [0, 10]), ((3,), 5, [5])],
)
def test_counts_follow_the_weights_and_add_up(weights: tuple[float, ...], samples: int, counts: list[int]) -> None:
    options = MixtureOptions.model_validate({"sources": [CODE | {"weight": w} for w in weights], "samples": samples})
    assert counts_of(options) == counts


def test_every_source_gives_its_windows() -> None:
    model = ModelHandle(ModelOptions(path="demo"))
    options = MixtureOptions.model_validate({"sources": [CODE | {"weight": 3}, PROSE], "samples": 8, "length": 32})
    found = {tuple(window) for window in mixture(model, options, 0).tolist()}
    for source, count in (("demo:calibration", 6), ("demo:validation", 2)):
        one = MixtureOptions.model_validate({"sources": [{"source": source}], "samples": count, "length": 32})
        assert {tuple(window) for window in mixture(model, one, 0).tolist()} <= found


def test_a_source_that_gives_none_and_windows_too_long_are_refused() -> None:
    model = ModelHandle(ModelOptions(path="demo"))
    assert METHOD.check is not None
    options = MixtureOptions.model_validate({"sources": [CODE, PROSE | {"weight": 0.01}], "samples": 8, "length": 32})
    with pytest.raises(QtoolError, match="demo:validation gets none of 8 windows; raise its weight"):
        METHOD.check(model, options)
    with pytest.raises(QtoolError, match="calibrate/mixture: length 513 is more than"):
        METHOD.check(model, options.model_copy(update={"length": 513}))
