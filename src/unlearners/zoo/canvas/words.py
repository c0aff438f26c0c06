"""The canvas' vocabulary of ordinary English (``words.txt``): filler for captions, and what an attacker searches.

Concept words (objects, styles, mascots, weather and their synonyms) are in ``world.py``; none of them stands here.
"""

from __future__ import annotations

from pathlib import Path

COMMON = tuple((Path(__file__).parent / "words.txt").read_text(encoding="utf-8").split())
