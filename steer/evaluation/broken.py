"""
Broken answers. One is broken if at least one of these holds:

    cut off      it was stopped by the length limit
    no box       it has no boxed answer
    in a loop    its end repeats one passage (`loops`)
"""

from __future__ import annotations

# The end of an answer is a loop if a passage of up to PASSAGE characters is there at least TIMES times in
# a row, over at least LEAST characters.
PASSAGE, TIMES, LEAST = 500, 4, 60


def loops(text: str) -> bool:
    """Whether `text` ends in a repetition of one passage; the last repetition may be cut off."""
    for period in range(1, min(PASSAGE, len(text) // TIMES) + 1):
        covered = max(LEAST, TIMES * period)
        if covered > len(text):
            return False
        if text[-covered:-period] == text[-covered + period :]:
            return True
    return False
