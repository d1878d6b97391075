import io
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from medsr_cli.training.curve import curve_png

HISTORY = [{"step": 500.0 * k, "stage": 0.0, "gain_db": -1 + 0.4 * k} for k in range(8)]
LOSSES = [(500 * k, 0.05 / k) for k in range(1, 8)]


def decoded(png):
    with Image.open(io.BytesIO(png)) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB")).astype(int)


def test_it_is_a_picture_and_not_blank():
    picture = decoded(curve_png(HISTORY, LOSSES, best_step=3500))
    assert picture.shape == (600, 960, 3)
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 20
    for half in (picture[:300], picture[300:]):
        coloured = np.ptp(half, axis=2) > 40
        assert coloured.sum() > 200
        assert np.ptp(np.nonzero(coloured)[1]) > 400


@pytest.mark.parametrize(
    ("history", "losses", "options"),
    [
        ([{**entry, "gain_db": entry["gain_db"] ** 2} for entry in HISTORY], LOSSES, {}),
        (HISTORY, [(step, value**2) for step, value in LOSSES], {}),
        (HISTORY[:4] + [{**entry, "stage": 1.0} for entry in HISTORY[4:]], LOSSES, {}),
        (HISTORY, LOSSES, {"best_step": 1000}),
        (HISTORY, LOSSES, {"unit": "Dice"}),
    ],
)
def test_other_data_give_another_picture(history, losses, options):
    plain = decoded(curve_png(HISTORY, LOSSES))
    assert (decoded(curve_png(history, losses, **options)) != plain).any()


def test_the_same_data_give_the_same_file():
    assert curve_png(HISTORY, LOSSES) == curve_png(HISTORY, LOSSES)


@pytest.mark.parametrize(
    ("history", "losses"), [([], []), (HISTORY[:1], []), (HISTORY, [(500, float("nan"))]), (HISTORY, [(1, -2.0)])]
)
def test_little_or_odd_data_are_drawn_too(history, losses):
    assert decoded(curve_png(history, losses)).std() > 1


def test_no_display_and_no_pyplot():
    program = (
        "import sys; from medsr_cli.training.curve import curve_png; "
        "assert curve_png([{'step': 0, 'gain_db': 1.0}])[:4] == b'\\x89PNG'; "
        "assert 'matplotlib.pyplot' not in sys.modules and 'torch' not in sys.modules"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "MPLBACKEND")}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)
