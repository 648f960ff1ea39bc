"""The words of the first version are gone: `docs/glossary.md` has those that took their place.

Each pattern is one left-hand word. An exception names the file and the reason: a word of another
field, of a library, or of a format that stays.
"""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

pytestmark = pytest.mark.unmeasured
ROOT = Path(__file__).parents[1]
HISTORY = (
    "CHANGELOG.md",
    "tests/test_words.py",
    "onellm_dist/config/old_keys.py",
    "tests/config/test_old_keys.py",
    "onellm_dist/train/records/old_runs.py",
    "tests/train/records/test_old_runs.py",
    "tests/fixtures/numeric_bounds/0.1.0.json",
)
"""Files that must name old words: the history, this test, and the answers to old keys."""
WORDS = {
    "tombstone": r"tombstone",
    "marks (of the guard)": r"\bmarks\.jsonl|\bsamples? (?:is|are|was|were|be) marked"
    r"|\bmark(?:s|ed|ing)? (?:a |the |bad |these |those )?samples?\b",
    "ledger": r"\bledger",
    "guard (of a run)": r"\bguards?\b",
    "leap": r"\bleaps?\b",
    "culprits, suspects, blame": r"culprit|suspect|\bblame",
    "verdict, judge": r"verdict|\bjudge",
    "standing steps, steps in vain": r"standing step|in vain\b",
    "divisor": r"divisor",
    "micro-step": r"micro[-_ ]?steps?\b|MicroStep",
    "dummy": r"\bdumm(?:y|ies)\b",
    "world, main": r"(?<!_)(?<!toy )\bworlds\b|(?<!toy )(?<![_.])\bworld(?:: int\b|, rank|, workers"
    r"|\)| workers)|\bfor world in\b|\bis_main\b(?!_process)|\bmain[ _]rank\b",
    "dealt": r"\bdealt\b",
    "run of a modality": r"\bruns? of (?:a |one |the |each |some )(?:modality|medium)\b"
    r"|\bruns? of (?:media|modalities)\b|\bmodality_runs\b",
    "Caps, Loads": r"\b(?:Caps|Loads)\b",
    "Segments, cu_q": r"\bcu_[qk]\b|\bmax_[qk]\b|\bSegments\b",
    "segment (of a plan)": r"new_segment|\b(?:plan|data)[ _]segments?\b"
    r"|\bsegments? of (?:a|the) plan\b",
    "text lengths, lengths sidecar": r"text_lengths|lengths? sidecar",
    "slots": r"\bslots?\b",
    "kind (of a sample)": r"\bkinds? of (?:a )?samples?\b",
    "throw a step away": r"\b(?:throw|throws|thrown|throwing) (?:\w+ ){0,3}away\b|\bthrew\b",
    "gates": r"\bgates\b",
    "starve": r"\bstarv",
    "spoil, witness": r"\bspoil|\bwitness",
    "settle, linger": r"\bsettle|\blinger",
    "in flight, host copy": r"in[-_ ]flight|InFlight|host[_ ]copy|HostCopy",
    "aside": r"(?m)^(?!.*mov(?:e|es|ed|ing)[ _].*aside).*\baside\b",
    "whole": r"whole checkpoint|newest whole|\bwhole on (?:every|each|all)\b|\bwhole weights\b"
    r"|\b(?:is|are|was|were|stays?|comes?|lies?|held|read) (?:not )?whole"
    r"(?:[.,;:)]| again\b| on\b)",
    "mend": r"\bmend(?:s|ed|ing)?\b",
    "take over": r"\b(?:take|takes|taken|took|taking) over\b",
    "obeyed": r"\bobey",
    "beat, rest (of a rank)": r"\.beat\(|\bbeats\b(?!_control)|\.rest\(",
    "notice (of the end)": r"\bnotice_s\b|NOTICE|signal[-_]notice|\bnotice\b",
    "phases of a start": r"\bphases? of (?:a|the|its|each|every|one) (?:\w+ )?start\b"
    r"|\bstart[ _]phases?\b|\bstart-?up phases?\b",
    "spec (of a source)": r"\b(?:raw|sample|split)[ _]specs?\b"
    r"|\bspecs? of (?:a |the )?(?:sample|split)",
    "Found, Became, Told, Tries, Needs, Opened": r"\bclass (?:Found|Became|Use|Look|Seen|Told|Tries"
    r"|Needs|Writing|Written|Opened|Candidate|Group|Layout|Crew|Claim|Unit|Outcome)\b(?!\(enum)",
    "crew": r"\bcrew",
    "claim, unit": r"\bclaim(?:s|ed|ing)? (?:a |an |the |its )?(?:shards?|tasks?|units?|work)\b"
    r"|\bclaims?/|\b(?:build|shard|work) units?\b|\bunits? of (?:work|a build|the build)\b",
    "adopt": r"\badopt",
    "catalogue, Place": r"\bcatalogue|\bPlace\b",
    "say=, tell": r"\bsay=|(?<![.\w])_tell|\btold\b|\btells\b",
    "stand-in": r"\bstand[-_]?ins?\b",
    "real rehearsal": r"real rehearsal|rehearse-real|rehearsal on real media",
    "is no number": r"(?<!there )\b(?:is|are|was|were) no (?!longer|better|more|problem|way|limit"
    r"|reason|place)\w+",
    "where not given": r"where (?:not|none is) given",
    "go on": r"\b(?:goes|go|going|went|gone) on (?:with|from|where)\b"
    r"|\b(?:runs?|starts?|ranks?|training|process|others?|answers?|cannot|can|must|may)"
    r" (?:goes|go|went|gone) on\b",
    "on the way": r"\b(?:ended|killed|stopped|interrupted)(?: and \w+)? on the way\b",
    "how equal": r"\bhow equal\b|what a run tells",
    "one behind the other": r"one behind the other",
}
CASE_MATTERS = {
    "Caps, Loads",
    "Segments, cu_q",
    "notice (of the end)",
    "Found, Became, Told, Tries, Needs, Opened",
    "catalogue, Place",
}
"""Names of classes and constants, which are words of English otherwise."""
EDGE = r"(?:(?<![A-Za-z0-9])(?=[A-Za-z0-9])|(?<=[A-Za-z0-9])(?![A-Za-z0-9]))"
"""Where a word begins or ends: an underscore does not belong to it."""
PATTERNS = {
    word: re.compile(pattern.replace(r"\b", EDGE), 0 if word in CASE_MATTERS else re.IGNORECASE)
    for word, pattern in WORDS.items()
}
WIDE = {word: pattern.replace(r"\b", "") for word, pattern in WORDS.items()}
LOOSE = {
    word: re.compile(pattern if word in CASE_MATTERS else pattern.lower())
    for word, pattern in WIDE.items()
}
"""Each matches wherever its pattern does, and more, in a tenth of the time: it looks for no edges,
and where case does not matter it is for text in lower case."""
SUFFIXES = ("py", "md", "yaml", "yml", "sh", "sbatch", "cfg", "toml", "def", "svg", "json")
NAMES = ("Makefile", "Dockerfile")
EXCEPTIONS: dict[str, dict[str, str]] = {
    "onellm_dist/train/state.py": {
        "Found, Became, Told, Tries, Needs, Opened": "the outcome of a run is one: Trainer.fit()"
    },
    "onellm_dist/launch/slurm/start_commands.py": {"slots": "a key of DeepSpeed's hostfile"},
    "tests/testing/slurm_cluster/test_rehearsal.py": {"slots": "a key of DeepSpeed's hostfile"},
}
"""File -> word -> why it stays."""


@cache
def tracked() -> dict[str, str]:
    """Name to text of every file of the repository that people or programs read words from."""
    listed = subprocess.run(
        ["git", "ls-files", *(f"*.{end}" for end in SUFFIXES), *(f"*{name}" for name in NAMES)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a git checkout: the list of files comes from git")
    names = [name for name in listed.stdout.split("\n") if name and name not in HISTORY]
    return {name: (ROOT / name).read_text(encoding="utf-8") for name in names}


@cache
def lowered() -> dict[str, str]:
    """The same in lower case."""
    return {name: text.lower() for name, text in tracked().items()}


@pytest.mark.parametrize("word", WORDS)
def test_the_old_word_is_gone(word: str) -> None:
    pattern = PATTERNS[word]
    searched = tracked() if word in CASE_MATTERS else lowered()
    found = [
        f"{name}:{number}: {line.strip()[:90]}"
        for name, text in tracked().items()
        if word not in EXCEPTIONS.get(name, {})
        and LOOSE[word].search(searched[name])
        and pattern.search(text)
        for number, line in enumerate(text.splitlines(), start=1)
        if pattern.search(line)
    ]
    assert not found, "\n".join([f"{len(found)} lines", *found[:20]])


def test_every_exception_is_still_needed() -> None:
    for name, words in EXCEPTIONS.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        for word in words:
            assert PATTERNS[word].search(text), f"{name} has no {word!r} any more"
