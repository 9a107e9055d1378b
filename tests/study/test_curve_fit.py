"""A planted scaling curve is found again, and read in both directions."""

import pytest

from utils.study.curves import fit

SIZES = [10, 20, 50, 100, 200, 500]


@pytest.mark.parametrize(("e0", "a", "b"), [(0.1, 2.0, 0.5), (0.0, 1.0, 0.3), (0.2, 1.5, 1.0)])
def test_a_planted_curve_is_found_again(e0, a, b):
    curve = fit(SIZES, [e0 + a * n**-b for n in SIZES])
    assert (curve.e0, curve.a, curve.b) == pytest.approx((e0, a, b), rel=1e-3, abs=1e-3)
    assert curve.error(80) == pytest.approx(e0 + a * 80**-b, abs=1e-4)
    assert float(curve.size(e0 + a * 80**-b)) == pytest.approx(80, rel=1e-2)
