"""Loaded by every Python that a test starts: its full garbage collections are rare.

While torch and what needs it are imported there are seven; they take a seventh of the time, and
hundreds of processes import them. `make soak`, which starts everything for real, does without.
"""

import gc
import os

if not os.environ.get("ONELLM_REAL_PROGRAMS"):
    gc.set_threshold(700, 10, 1000)
