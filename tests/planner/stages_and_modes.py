"""What is trained and what is computed again, in pairs."""

from __future__ import annotations

import pytest

STAGES_AND_MODES = [
    *(("align", "none"), ("align", "full"), ("tune", "selective")),
    *(
        pytest.param(*pair, marks=pytest.mark.soak)
        for pair in (("align", "selective"), ("tune", "none"), ("tune", "full"))
    ),
]
"""Each stage and each mode of recomputation; all pairs in `make soak`."""
