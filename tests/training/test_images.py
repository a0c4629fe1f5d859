"""Contact sheets: every picture whole and in its place, every label inside the sheet and off the pictures."""

import numpy as np
import pytest
import torch
from comfyui_dmm.dmm_core.vae import AutoencoderKL, VAEConfig
from comfyui_dmm.training.paint.images import PAPER, blend_strip, decode_to_pil, grid, wrap
from PIL import Image, ImageFont

LONG = "a style name so long that no picture is wide enough for it, whatever its size may be in the end"


def colour(row: int, column: int) -> tuple[int, int, int]:
    return (40 + 60 * row, 250 - 50 * column, 10)


def picture(row: int, column: int, size=(40, 30)) -> Image.Image:
    return Image.new("RGB", size, colour(row, column))


def box(sheet: np.ndarray, rgb) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a colour; asserts that it fills that box, that is, that nothing is drawn over it."""
    ys, xs = np.nonzero((sheet == rgb).all(-1))
    found = xs.min(), ys.min(), xs.max() + 1, ys.max() + 1
    assert len(xs) == (found[2] - found[0]) * (found[3] - found[1])
    return found


@pytest.mark.parametrize("labels", [None, ["ink", LONG], ["", "unbroken" * 30]])
def test_pictures_are_whole_in_order_and_clear_of_labels(labels):
    columns = None if labels is None else [*labels, LONG]
    sheet = grid(
        [[picture(r, c) for c in range(3)] for r in range(2)], labels, columns, title="" if labels is None else LONG
    )
    pixels = np.asarray(sheet)
    boxes = [[box(pixels, colour(r, c)) for c in range(3)] for r in range(2)]
    for r in range(2):
        for c in range(3):
            left, top, right, bottom = boxes[r][c]
            assert (right - left, bottom - top) == (40, 30)
            assert c == 0 or left > boxes[r][c - 1][2] and top == boxes[r][c - 1][1]
            assert r == 0 or top > boxes[r - 1][c][3] and left == boxes[r - 1][c][0]
    edges = [pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]
    assert all((edge == PAPER).all() for edge in edges)  # no text runs out of the sheet
    drawn = (pixels != PAPER).any(-1).sum() - 6 * 40 * 30
    assert (drawn > 0) == (labels is not None)


@pytest.mark.parametrize("side", ["row", "column", "title"])
def test_each_label_keeps_to_its_side(side):
    labels = {"row": {"row_labels": ["ink", LONG]}, "column": {"col_labels": [LONG, "ink"]}, "title": {"title": LONG}}[
        side
    ]
    pixels = np.asarray(grid([[picture(r, c) for c in range(2)] for r in range(2)], **labels))
    left, top, _, _ = box(pixels, colour(0, 0))
    ink = (pixels != PAPER).any(-1)
    for r in range(2):
        for c in range(2):
            ink &= (pixels != colour(r, c)).any(-1)
    ys, xs = np.nonzero(ink)
    assert len(xs) > 100 and (xs.max() < left if side == "row" else ys.max() < top)
    if side == "row":  # the second label beside the second row
        second = box(pixels, colour(1, 0))[1]
        assert (ys < second).any() and (ys >= second).any()


def test_empty_cells_and_sizes_that_differ():
    pixels = np.asarray(grid([[picture(0, 0), None], [picture(1, 0, (20, 10)), picture(1, 1)]]))
    left, top, right, bottom = box(pixels, colour(0, 0))
    small = box(pixels, colour(1, 0))
    assert (small[0] + small[2], small[2] - small[0], small[3] - small[1]) == (
        left + right,
        20,
        10,
    )  # centred in its cell


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([[]], "rows of one length"),
        ([[[None]]], "needs pictures"),
        ([[[picture(0, 0)], []]], "rows of one length"),
        ([[[picture(0, 0)]], ["a", "b"]], "2 row labels for 1 rows"),
        ([[[picture(0, 0)]], None, []], "0 column labels for 1 columns"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        grid(*arguments)


@pytest.mark.parametrize("text", ["", "ink", LONG, "unbroken" * 30, "two words", "tab\tand\nline", "日本語 ✨"])
@pytest.mark.parametrize("width", [40, 128, 400])
def test_wrapped_text_fits_and_keeps_its_beginning(text, width):
    font = ImageFont.load_default(15)
    lines = wrap(text, font, width)
    assert len(lines) <= 3 and all(font.getlength(line) <= width for line in lines)
    kept, whole = "".join("".join(lines).split()), "".join(text.split())
    assert kept == whole or kept.endswith("…") and whole.startswith(kept[:-1]) and len(lines) == 3


def test_blend_strip_runs_from_start_to_end():
    images = [picture(0, c) for c in range(4)]
    pixels = np.asarray(blend_strip(images, "ink", "pop"))
    lefts = [box(pixels, colour(0, c))[0] for c in range(4)]
    assert lefts == sorted(lefts)
    labelled = grid([images], col_labels=["ink", "33% pop", "67% pop", "pop"])
    assert np.array_equal(pixels, np.asarray(labelled))
    assert np.array_equal(
        np.asarray(blend_strip(images[:1], "ink", "pop", [1.0])), np.asarray(grid([images[:1]], None, ["pop"]))
    )
    with pytest.raises(ValueError, match="2 weights for 4 pictures"):
        blend_strip(images, "ink", "pop", [0, 1])


def test_decoded_pictures_are_the_vaes():
    torch.manual_seed(0)
    vae = AutoencoderKL(VAEConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1)).eval()
    latents = torch.randn(5, 4, 6, 8)
    with torch.no_grad():
        expected = ((vae.decode(latents / 0.5) / 2 + 0.5) * 255).clamp(0, 255)
    images = decode_to_pil(vae, latents, scale=0.5, batch=2)
    assert [image.size for image in images] == [(16, 12)] * 5
    got = torch.stack([torch.from_numpy(np.array(image)).float() for image in images]).permute(0, 3, 1, 2)
    assert expected.std() > 5
    torch.testing.assert_close(got, expected, rtol=0, atol=0.51)  # rounding to whole steps of 1/255
