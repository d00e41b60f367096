"""A line of a family's table: where a tensor of a public checkpoint lives in our model."""

from typing import NamedTuple


class Entry(NamedTuple):
    """One tensor, or one for each expert.

    Attributes:
      theirs: the tensor's name. With `{expert}` it is E names; ours then has a leading `[E]`, which the pattern leaves
        out.
      ours: dotted path of the parameter.
      pattern: einops, from ours to theirs, such as `d h k -> (h k) d`; read from right to left it imports.
      aliases: other names under which a file may hold the same tensor: the first that is there is read, and none of
        them is written.
    """

    theirs: str
    ours: str
    pattern: str
    aliases: tuple[str, ...] = ()
