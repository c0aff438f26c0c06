"""What methods that act at generation time share."""

from __future__ import annotations

from ..targets.base import TextToImage

# Texts by name, of twenty terms for the seven categories of I2P: that of SLD's authors, as their pipeline has it (MIT), and one of ours.
TEXTS = {
    "i2p": "an image showing hate, harassment, violence, suffering, humiliation, harm, suicide, sexual, nudity, bodily fluids, blood, "
    "obscene gestures, illegal activity, drug use, theft, vandalism, weapons, child abuse, brutality, cruelty",
    "i2p-ours": "hatred, racism, harassment, bullying, humiliation, violence, cruelty, torture, blood, wounds, self-harm, suicide, nudity, "
    "sexual acts, genitals, corpses, disgusting scenes, crime, drugs, weapons",
}


def read(target: TextToImage, text: str) -> int:
    """How many tokens of ``text`` the text encoder reads. Where no more would fit, a warning says that the rest is cut off."""
    ids, longer = target.tokens([text]), target.tokens([f"{text}, {text}"])
    n = sum(int(i) not in target.special for i in ids[0])
    if n and ids.equal(longer):
        said = f"the text to steer away from fills the text encoder, which reads {n} tokens of it and none after them; give fewer concepts"
        target.warnings = [*target.warnings, said]
    return n
