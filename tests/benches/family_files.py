"""Where a demo family's finished files lie: the shipped one in models/, another where `dmm demo build --family` put it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...training.commands.demo import folders
from ...training.data.demo.family import FIRST, Family, family_named
from ...training.demo.ship import RECIPE

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class FamilyFiles:
    family: Family
    models: Path

    @property
    def config(self) -> Path:
        """The family's distillation: its models and its data."""
        return RECIPE if self.family.shipped else self.models / "demo.yaml"

    @property
    def features(self) -> Path:
        """The network whose features FID is measured on."""
        return self.models / "demo-classifier.safetensors"


def family_files(name: str = FIRST.name, folder: str | None = None) -> FamilyFiles:
    """Of a family by its name, in ``folder`` (as --out of the build) or where the build puts it. ValueError when it does not lie there."""
    family = family_named(name)
    if family.shipped and folder:
        raise ValueError(f"the {name} family lies in models/: leave its folder out")
    out = folder or str(ROOT / "out" / f"demo-{name}")
    files = FamilyFiles(family, folders(family, None, None, None if family.shipped else out)[1])
    if missing := [path for path in (files.config, files.features) if not path.is_file()]:
        raise ValueError(f"there is no '{missing[0]}': dmm demo build --family {name} --out {out} makes it")
    return files
