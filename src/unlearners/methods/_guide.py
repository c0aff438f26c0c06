"""What methods that act at generation time share."""

from __future__ import annotations

from ..targets.base import TextToImage


def read(target: TextToImage, text: str) -> int:
    """How many tokens of ``text`` the text encoder reads. Where no more would fit, a warning says that the rest is cut off."""
    ids, longer = target.tokens([text]), target.tokens([f"{text}, {text}"])
    n = sum(int(i) not in target.special for i in ids[0])
    if n and ids.equal(longer):
        said = f"the text to steer away from fills the text encoder, which reads {n} tokens of it and none after them; give fewer concepts"
        target.warnings = [*target.warnings, said]
    return n
