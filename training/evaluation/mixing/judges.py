"""Who says which style and which caption a picture shows: the demo classifier, or the student itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from torch import Tensor

from ..features import FeatureNet

if TYPE_CHECKING:
    from ...demo.classifier import Classifier


def looks_of(classifier: FeatureNet) -> list[str]:
    """The styles that a feature network can name, in the order of its answers; [] for a network that is not the demo classifier."""
    return getattr(classifier.network, "classes", {}).get("look", [])


def answers_of(classifier: FeatureNet, features: Tensor) -> dict[str, Tensor]:
    """The classifier's pooled features (n, size) -> logits (n, answers), float32 on the CPU, for each question: look, shape, colour."""
    heads = cast("Classifier", classifier.network).heads
    weight = next(heads.parameters())
    return {question: head(features.to(weight)).float().cpu() for question, head in heads.items()}


def caption_truth(caption: str, classifier: FeatureNet) -> list[tuple[str, int]] | None:
    """(question, right answer) for the shape and the colour that a caption names; None when it names neither, and when it names two shapes
    or two colours."""
    words = caption.lower().replace(",", " ").split()
    classes = cast("Classifier", classifier.network).classes
    found: list[tuple[str, int]] = []
    for question in ("shape", "colour"):
        answers = classes.get(question, [])
        named = [k for k, answer in enumerate(answers) if answer in words]
        if len(named) > 1:
            return None
        found += [(question, k) for k in named]
    return found or None


def wins(errors: Tensor, first: int, second: int) -> Tensor:
    """(n, draws, candidates) -> (n,): share of the draws (t, eps) in which the second style explains a picture better than the first.

    Only the signs of the differences count: probabilities would need a temperature, which is not known. A tie counts half.
    """
    a, b = errors[..., first], errors[..., second]
    return ((a > b).float() + 0.5 * (a == b).float()).mean(1)


def is_neither(answer: Tensor, first: int, second: int) -> Tensor:
    """Answers (n,), indices of styles -> (n,) float: 1 where the answer is neither of the two styles."""
    return ((answer != first) & (answer != second)).float()
