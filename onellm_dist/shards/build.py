"""`onellm shards build`: finds the source by its name, checks its options, and builds into a staging folder."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from onellm_dist.errors import EXIT_DONE, OneLLMError, UsageError
from onellm_dist.shards import sources as sources_folder
from onellm_dist.shards.adopt import index_path
from onellm_dist.shards.naming import dataset_name, parse_modalities
from onellm_dist.shards.sources.base import BuildReport, Source
from onellm_dist.shards.staging import QUARANTINE, staged


def all_sources() -> dict[str, Source]:
    """Name to source: every module in shards/sources/ that has a `SOURCE`."""
    found = []
    for info in pkgutil.iter_modules(sources_folder.__path__):
        module = importlib.import_module(f"{sources_folder.__name__}.{info.name}")
        if isinstance(getattr(module, "SOURCE", None), Source):
            found.append(module.SOURCE)
    return {s.name: s for s in sorted(found, key=lambda s: s.name)}


def get_source(name: str) -> Source:
    """The source of this name.

    Raises:
        UsageError: there is none.
    """
    known = all_sources()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        raise UsageError(
            f"unknown source {name!r}{f'; did you mean {close[0]!r}?' if close else ''}",
            "no module in onellm_dist/shards/sources/ builds it.",
            "use one of: " + "; ".join(f"{s.name} ({s.summary})" for s in known.values()),
        )
    return known[name]


def build_dataset(
    source: str, inputs: Path | None, out: Path, *, workers: int = 1, seed: int = 0, overwrite: bool = False, **options: Any
) -> BuildReport:
    """Builds a dataset folder (or, for `toyworld`, a folder of them); `out` appears only when it is whole.

    Args:
        source: "folder", "toyworld", ... (see `all_sources`).
        inputs: what is read; None for generated data.
        out: the new folder. Must be absent or empty, or hold datasets and `overwrite` be given.
        workers: processes; the output's bytes do not depend on it.
        seed: for sources that draw or shuffle.
        options: the source's own (`Source.options`); texts are converted to their types.

    Returns:
        What was built and what was left out (`summary` makes lines of it).

    Raises:
        UsageError: unknown source or option, wrong type, missing input, occupied output.
        OneLLMError: the build was given up; nothing stands under `out`.
    """
    kind = get_source(source)
    if kind.needs_input and inputs is None:
        raise UsageError(f"source {source!r} needs an input.", "there is nothing to read.", f"onellm shards build {source} IN OUT")
    if inputs is not None and not Path(inputs).exists():
        raise UsageError(f"{inputs}: there is no such file or folder.", "there is nothing to read.", "check the path.")
    if workers < 1:
        raise UsageError(f"workers={workers} is below 1.", "somebody must do the work.", "give 1 or more.")
    complete = _complete_options(kind, options)
    if complete.get("name", "") is None:
        complete["name"] = dataset_name(Path(out))
    try:
        with staged(Path(out), overwrite=overwrite) as folder:
            assert kind.build is not None
            report = kind.build(None if inputs is None else Path(inputs), folder, workers=workers, seed=seed, **complete)
    except OSError as error:
        raise OneLLMError(
            f"{error.filename or out}: {error.strerror or error}.",
            f"the build was given up; nothing stands under {out}.",
            "mend it and build again.",
        ) from error
    return report if report is not None else BuildReport(0)


def _complete_options(source: Source, given: dict[str, Any]) -> dict[str, Any]:
    for name in given:
        if name not in source.options:
            close = difflib.get_close_matches(name, source.options, n=1)
            raise UsageError(
                f"source {source.name!r} has no option {name!r}{f'; did you mean {close[0]!r}?' if close else ''}",
                "an option that is not understood would be ignored.",
                f"it has: {', '.join(source.options) or 'none'}.",
            )
    return {name: option.convert(name, given.get(name, option.default)) for name, option in source.options.items()}


def build_recipe(recipe: Path, *, overwrite: bool = False, **overrides: Any) -> tuple[Path, BuildReport]:
    """Builds from a dataset recipe (YAML): `source`, `inputs`, `out`, `workers`, `seed`, and the source's `options`.

    `inputs` and `out` are relative to the current folder. `overrides` replace top-level keys, or options by name.

    Returns:
        (the output folder, the report).

    Raises:
        UsageError: no readable recipe, or a key that is not understood.
    """
    try:
        content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{recipe}: {error}", "the recipe cannot be read.", "see shards/folder.yaml for an example.") from error
    top = {"source", "inputs", "out", "workers", "seed", "options"}
    if not isinstance(content, dict) or not isinstance(content.get("options") or {}, dict):
        raise UsageError(f"{recipe} is no mapping of keys to values.", "it is no dataset recipe.", "see shards/folder.yaml for an example.")
    values = {k: v for k, v in content.items() if k != "options"}
    options = dict(content.get("options") or {})
    for key, value in overrides.items():
        (values if key in top else options)[key] = value
    unknown, missing = sorted(set(values) - top), sorted({"source", "out"} - values.keys())
    if unknown or missing:
        faults = [*(f"unknown key {k!r}" for k in unknown), *(f"no key {k!r}" for k in missing)]
        raise UsageError(
            f"{recipe}: {', '.join(faults)}.", "the recipe is not built as written.", f"its keys are: {', '.join(sorted(top))}."
        )
    out, inputs = Path(values["out"]), values.get("inputs")
    report = build_dataset(
        values["source"], None if inputs is None else Path(inputs), out,
        workers=int(values.get("workers", 1)), seed=int(values.get("seed", 0)), overwrite=overwrite, **options,
    )  # fmt: skip
    return out, report


def build_command(source: str, paths: list[Path], options: list[str], *, workers: int, seed: int, overwrite: bool) -> int:
    """`onellm shards build`: SOURCE [IN] OUT with `key=value` options, or a dataset recipe (YAML).

    What is given here and is not the default replaces what the recipe says.

    Returns:
        The exit code.

    Raises:
        OneLLMError: as `build_dataset`.
    """
    if source.endswith((".yaml", ".yml")):
        given: dict[str, Any] = dict(zip(("out", "inputs"), reversed(paths), strict=False))
        given.update({k: v for k, v, default in (("workers", workers, 1), ("seed", seed, 0)) if v != default})
        out, report = build_recipe(Path(source), overwrite=overwrite, **given, **_pairs(options))
    else:
        kind = get_source(source)
        if "help" in options:
            print(options_help(kind))
            return EXIT_DONE
        expected = 2 if kind.needs_input else 1
        if len(paths) != expected:
            raise UsageError(
                f"source {source!r} takes {'IN and OUT' if kind.needs_input else 'OUT alone'}, and {len(paths)} paths were given.",
                "it is not clear what is read and what is written.",
                f"onellm shards build {source} {'IN OUT' if kind.needs_input else 'OUT'}",
            )
        out, inputs = paths[-1], paths[0] if kind.needs_input else None
        report = build_dataset(source, inputs, out, workers=workers, seed=seed, overwrite=overwrite, **_pairs(options))
    print(summary(report, out))
    return EXIT_DONE


def _pairs(options: list[str]) -> dict[str, str]:
    for option in options:
        if "=" not in option:
            raise UsageError(
                f"option {option!r} is no key=value.", "its value is not known.", "write -o key=value; -o help lists the keys."
            )
    return dict(option.split("=", 1) for option in options)


def options_help(source: Source) -> str:
    """A source's options, a line each."""
    lines = [f"{source.name}: {source.summary}", *(f"  {n}={o.default}  ({o.kind.__name__}) {o.help}" for n, o in source.options.items())]
    return "\n".join(lines)


def index_command(paths: list[Path], modalities: list[str]) -> int:
    """`onellm shards index`: indexes tars and folders of tars. Returns the exit code."""
    wanted = parse_modalities(",".join(modalities)) if modalities else None
    for path in paths:
        done = index_path(path, modalities=wanted)
        where = f"; it is a dataset now ({done.manifest})" if done.manifest else "; to train from it, index its folder"
        print(f"{path}: {done.tars} tar{'s' if done.tars != 1 else ''}, {done.samples} samples indexed{where}")
    return EXIT_DONE


def summary(report: BuildReport, out: Path) -> str:
    """The lines a command prints after a build."""
    lines = [f"{out}: {report.samples} samples", *report.notes] if report.samples else [f"{out}: built", *report.notes]
    if report.quarantined:
        lines.append(f"left out: {len(report.quarantined)} (all in {out / QUARANTINE})")
        kinds = Counter(q.reason.split(":")[0] for q in report.quarantined)
        lines += [f"  {count} x {kind}" for kind, count in kinds.most_common()]
        lines += [f"  {q.file}: {q.reason}" for q in report.quarantined[:5]]
    return "\n".join(lines)
