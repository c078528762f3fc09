"""A network as a backbone: the features that it has, and the selection of some of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class StageInfo(NamedTuple):
    """One of a network's features.

    Attributes:
      name: "stem", "stage1", "stage2", …
      channels: channels of its output.
      stride: the factor by which its output is smaller than the image, in height and width.
      dilation: the distance between the taps of its 3×3 convolutions, if dilation replaced stride.
    """

    name: str
    channels: int
    stride: int
    dilation: int = 1


def chosen(features: bool | str | Sequence[str] | None, stages: Sequence[StageInfo]) -> tuple[str, ...]:
    """Returns the names of the requested features, () for none; True means all but the stem.

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
