"""The names of the model families: many sizes, each plain, with squeeze-and-excitation, and with regulators."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

CIFAR_DEPTHS = (20, 32, 44, 56, 110)
IMAGENET_STAGES = {
    18: ("basic", (2, 2, 2, 2)),
    34: ("basic", (3, 4, 6, 3)),
    50: ("bottleneck", (3, 4, 6, 3)),
    101: ("bottleneck", (3, 4, 23, 3)),
}


def _cifar_sizes(depth: int, constant: int, least: int) -> tuple[int, ...]:
    """Returns the stages of a CIFAR network of depth 6m + constant; other depths raise a ValueError that names the
    nearest ones.
    """
    if depth >= least and depth % 6 == constant:
        return ((depth - constant) // 6,) * 3
    below = max(least, depth - (depth - constant) % 6)
    raise ValueError(f"a CIFAR network has depth 6m+{constant} (nearest: {below} or {below + 6})")


def _resnet(size: str) -> dict[str, Any]:
    depth = int(size)
    if depth in IMAGENET_STAGES:
        block, sizes = IMAGENET_STAGES[depth]
        return {"stage_sizes": sizes, "block": block, "stem": "imagenet", "width": 64}
    try:
        return {"stage_sizes": _cifar_sizes(depth, 2, 8)}
    except ValueError as error:
        raise ValueError(f"{error}, an ImageNet network {', '.join(map(str, IMAGENET_STAGES))}") from None


def _preact(size: str) -> dict[str, Any]:
    return {"block": "preact", "stage_sizes": _cifar_sizes(int(size), 2, 8)}


def _numbers(size: str) -> list[int]:
    found = [int(number) for number in re.findall(r"\d+", size)]
    if not all(found):
        raise ValueError(f"{size} has a 0: its numbers must be at least 1")
    return found


def _wide(size: str) -> dict[str, Any]:
    depth, factor = _numbers(size)
    return {"block": "preact", "stage_sizes": _cifar_sizes(depth, 4, 10), "width": 16 * factor, "stem_width": 16}


def _grouped(depth: int, groups: int, width_per_group: int) -> dict[str, Any]:
    # The stride is in the 3×3 convolution, as in both papers' code and in torchvision.
    stride = {"bottleneck_stride": "3x3"}
    return _resnet(str(depth)) | stride | {"groups": groups, "width_per_group": width_per_group}


def _resnext(size: str) -> dict[str, Any]:
    depth, groups, width = _numbers(size)
    return _grouped(depth, groups, width)


def _wide_imagenet(size: str) -> dict[str, Any]:
    depth, factor = _numbers(size)
    return _grouped(depth, 1, 64 * factor)


def _dia(size: str) -> dict[str, Any]:
    if size == "164":  # He's network of bottlenecks, of depth 9m+2; networks of basic blocks have depth 6m+2
        fields = {"stage_sizes": (18, 18, 18), "block": "bottleneck"}
    else:
        fields = _resnet(size)
    return fields | {"regulator": "dia", "block": f"dia_{fields.get('block', 'basic')}"}


class Family(NamedTuple):
    """Networks of one kind.

    Attributes:
      plain: the name's part before the size, for networks without regulators.
      regulated: the same for networks with regulators; "" if the family supports neither them nor
        squeeze-and-excitation.
      size: a pattern of the sizes.
      listed: the sizes in `list_models`.
      fields: maps a size to RegNet's fields; raises ValueError for an impossible size.
    """

    plain: str
    regulated: str
    size: str
    listed: tuple[str, ...]
    fields: Callable[[str], dict[str, Any]]

    def names(self, regulators: Iterable[str | None]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields the listed names with each of these regulators (None for no regulator), and RegNet's fields."""
        for size in self.listed:
            for squeeze_excite in (False, True) if self.regulated else (False,):
                for regulator in regulators if self.regulated else (None,):
                    name = f"{self.regulated}{size}_{regulator}" if regulator else f"{self.plain}{size}"
                    name = f"se_{name}" if squeeze_excite else name
                    yield name, _with(self.fields(size), regulator, squeeze_excite)

    def parse(self, name: str, regulators: Iterable[str]) -> dict[str, Any] | None:
        """Returns RegNet's fields for a name of the family, None for another name; ValueError for a wrong size."""
        if not self.regulated:
            match = re.fullmatch(rf"{self.plain}({self.size})", name)
            return self.fields(match[1]) if match else None
        plain, cells = rf"{self.plain}({self.size})", "|".join(regulators)
        match = re.fullmatch(rf"(se_)?(?:{plain}|{self.regulated}({self.size})_({cells}))", name)
        return _with(self.fields(match[2] or match[3]), match[4], bool(match[1])) if match else None


def _with(fields: dict[str, Any], regulator: str | None, squeeze_excite: bool) -> dict[str, Any]:
    return {"regulator": regulator, "squeeze_excite": squeeze_excite} | fields


RESNETS = Family("resnet", "regnet", r"\d+", tuple(map(str, (*CIFAR_DEPTHS, *IMAGENET_STAGES))), _resnet)
OTHERS = (
    Family("preact_resnet", "preact_regnet", r"\d+", ("20", "110"), _preact),
    Family("wrn", "wrn", r"\d+_\d+", ("16_8", "28_10", "40_4"), _wide),
    Family("resnext", "regnext", r"(?:50|101)_\d+x\d+d", ("50_32x4d", "101_32x8d"), _resnext),
    Family("wide_resnet", "wide_regnet", r"(?:50|101)_\d+", ("50_2", "101_2"), _wide_imagenet),
    Family("dia_resnet", "", r"\d+", tuple(map(str, (*CIFAR_DEPTHS, 164, 50, 101))), _dia),
)
