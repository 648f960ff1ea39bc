"""Loaded by every Python that a test starts: its full garbage collections are rare.

While torch and what needs it are imported there are seven; they take a seventh of the time, and
hundreds of processes import them.
"""

import gc

gc.set_threshold(700, 10, 1000)
