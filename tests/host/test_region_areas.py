"""Areas that the user's own nodes gave a prompt, where a region or a tile is painted on a crop: refused by name."""

import pytest

from .families import DEMO, NAMES, checkpoint_of, random_unet
from .test_regions_host import LEFT, NEGATIVE, POSITIVE, mix, paint, panorama, region
from .test_sampling_equals_core import load

PIXELS = (64, 32, 0, 0, 1.0)
SHARES = (0.5, 1.0, 0.0, 0.0, 1.0)


@pytest.fixture(scope="module")
def model(models):
    return load(models, checkpoint_of(random_unet(DEMO)), "region-areas")


def with_area(conditioning, values=PIXELS):
    import nodes

    node = nodes.ConditioningSetAreaPercentage() if values is SHARES else nodes.ConditioningSetArea()
    return node.append(conditioning, *values)[0]


def on_own_prompt(model, values):
    return mix(model, region(NAMES[1], positive=with_area(LEFT, values)))


def on_own_negative(model, values):
    return mix(model, region(NAMES[1], negative=with_area(LEFT, values)))


def behind_the_mix(model, values):
    positive, negative = mix(model, region(NAMES[1]))
    return with_area(positive, values), negative


def on_a_tile(model, values):
    return panorama(model, region(NAMES[0]), region(NAMES[1], positive=with_area(LEFT, values)), tile=32, overlap=0.0)


@pytest.mark.parametrize("values", [PIXELS, SHARES], ids=["pixels", "shares"])
@pytest.mark.parametrize("where", [on_own_prompt, on_own_negative, behind_the_mix, on_a_tile])
def test_an_area_on_a_crop(model, where, values):
    place = "32 x 32 pixels at 32, 0" if where is on_a_tile else "32 x 64 pixels at 0, 0"
    with pytest.raises(ValueError, match=rf"in style '{NAMES[1]}' \({place}\) has an area of its own"):
        paint(model, where(model, values))


def test_other_prompts_keep_their_areas(model):
    """Where nothing is cropped there is room for the host's area."""
    area = with_area(LEFT)
    whole = region(NAMES[1], positive=POSITIVE + area, paint_on="whole canvas")
    for prompts in (mix(model, whole), mix(model, region(NAMES[1])), mix(model, region(NAMES[1]), mode="one pass")):
        mixed, more = paint(model, prompts), paint(model, (prompts[0] + area, NEGATIVE))
        assert more.isfinite().all() and not more.equal(mixed)
