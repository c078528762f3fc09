"""What users of a network as a backbone ask of it: which features there are, and which of them they want."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class StageInfo(NamedTuple):
    """One of a network's features.

    Attributes:
      name: "stem", "stage1", "stage2", …
      channels: of its output.
      stride: by which its output is smaller than the image, in height and width.
      dilation: the distance between the taps of its 3×3 convolutions, where dilation took the place of stride.
    """

    name: str
    channels: int
    stride: int
    dilation: int = 1


def chosen(features: bool | str | Sequence[str] | None, stages: Sequence[StageInfo]) -> tuple[str, ...]:
    """The names of the features that are asked for, () for none; True is all but the stem.

    Raises:
      ValueError: a name is not one of the network's; the message lists them.
    """
    names = tuple(stage.name for stage in stages)
    if isinstance(features, bool) or features is None:
        return names[1:] if features else ()
    wanted = (features,) if isinstance(features, str) else tuple(features)
    for name in wanted:
        if name not in names:
            raise ValueError(f"features has {name!r}: it must be True or some of {', '.join(map(repr, names))}")
    return tuple(name for name in names if name in wanted)
