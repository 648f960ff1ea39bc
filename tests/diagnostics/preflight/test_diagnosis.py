"""What the preflight concludes from what the ranks reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from onellm_dist.common.errors import UsageError
from onellm_dist.config.load import load_config
from onellm_dist.diagnostics.preflight.diagnosis.diagnose import find_faults, get_excluded_nodes
from onellm_dist.diagnostics.preflight.diagnosis.fault import GIB
from onellm_dist.diagnostics.preflight.diagnosis.reports import NodeReports
from onellm_dist.diagnostics.preflight.disks import probe_disk
from onellm_dist.diagnostics.preflight.host import parse_ecc
from onellm_dist.diagnostics.preflight.links import make_rounds
from onellm_dist.diagnostics.preflight.options import (
    ALL,
    PRETEND,
    PreflightOptions,
    SimulatedFaults,
    get_node_name,
    read_simulated_faults,
)
from onellm_dist.diagnostics.preflight.resource_needs import estimate_needs
from onellm_dist.diagnostics.preflight.result import format_result
from onellm_dist.diagnostics.preflight.run import get_expected_nodes
from onellm_dist.diagnostics.preflight.versions import (
    compute_code_digest,
    find_differences,
    get_environment,
)

NODES = ("a", "b", "c", "d")


def make_report(rank: int, **changes: Any) -> dict[str, Any]:
    node = NODES[rank]
    gpu = {
        "missing": False,
        "count": 8,
        "name": "A100",
        "free": 79 * GIB,
        "total": 80 * GIB,
        "flops": 250e12,
        "repeatable": True,
    }
    return {
        "rank": rank,
        "node": node,
        "errors": {},
        "versions": {"torch": "2.15", "python": "3.11"},
        "environment": {"NCCL_DEBUG": "WARN"},
        "host": {
            "memory_free": 500 * GIB,
            "memory_total": 512 * GIB,
            "shm_free": 64 * GIB,
            "open_files": 65536,
            "cores": 64,
        },
        "gpu": gpu,
        "ecc": [
            {
                "index": "0",
                "ecc.errors.uncorrected.volatile.total": "0",
                "retired_pages.pending": "No",
            }
        ],
        "disk": {"free": 1000 * GIB, "write": 1e9, "read": 2e9},
        "data": {"read": 1e9, "missing": []},
        "sees": list(NODES),
        "pairs": [{"with": other, "speed": 20e9} for other in NODES if other != node],
        **changes,
    }


def make_reports(changes: dict[int, dict[str, Any]], **more: Any) -> NodeReports:
    reports = {rank: make_report(rank, **changes.get(rank, {})) for rank in range(len(NODES))}
    return NodeReports(
        {node: [i] for i, node in enumerate(NODES)},
        reports,
        more.pop("missing", {}),
        skews=more.pop("skews", {}),
        **more,
    )


def change_gpu(**changes: Any) -> dict[str, Any]:
    return {"gpu": {**make_report(0)["gpu"], **changes}}


def set_link_speed(speed: float) -> dict[str, Any]:
    return {"pairs": [{"with": other, "speed": speed} for other in "abd"]}


def test_healthy_nodes_have_no_faults() -> None:
    assert find_faults(make_reports({}), PreflightOptions()) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (change_gpu(flops=100e12), "100 TFLOP/s, the median is 250"),
        (change_gpu(repeatable=False), "other bits"),
        (change_gpu(free=60 * GIB), "used by another process"),
        (change_gpu(missing=True, count=4), "has no GPU: the node shows 4"),
        ({"gpu": None}, "sees no GPU, others do"),
        (
            {"ecc": [{"index": "3", "ecc.errors.uncorrected.volatile.total": "2"}]},
            "GPU 3: 2 memory errors",
        ),
        (set_link_speed(1e9), "the nodes' median is 20"),
        (
            {"pairs": [{"with": "a", "error": "timed out"}, {"with": "b", "error": "timed out"}]},
            "no all-reduce with any of its partners",
        ),
        ({"disk": {"free": 0, "error": "No space left on device"}}, "No space left"),
        ({"sees": ["c"]}, "not the directory that a, b, d see"),
        ({"data": {"read": None, "missing": ["/data/laion"]}}, "cannot read /data/laion"),
        ({"versions": {"torch": "2.11", "python": "3.11"}}, "torch is 2.11, on a, b, d it is 2.15"),
        ({"errors": {"host": "not done within 60 s"}}, "host: not done within 60 s"),
    ],
    ids=[
        "slow-gpu",
        "sick-gpu",
        "busy-gpu",
        "few-gpus",
        "no-gpu",
        "ecc",
        "slow-link",
        "no-link",
        "full",
        "not-shared",
        "no-data",
        "version",
        "stuck",
    ],
)
def test_a_fault_of_one_node_is_its_own_and_excludes_it_alone(
    changes: dict[str, Any], words: str
) -> None:
    found = make_reports({2: changes})
    faults = find_faults(found, PreflightOptions())
    assert [fault.node for fault in faults if words in fault.what] == ["c"], faults
    assert get_excluded_nodes(found, faults) == ["c"]
    assert words in format_result(found, faults, ["c"], 3.0) and "--exclude=c" in format_result(
        found, faults, ["c"], 3.0
    )


def test_ranks_that_see_the_same_gpu_are_named() -> None:
    """A node of two ranks; each process sees one GPU."""
    for uuids, faulty in ((("x", "y"), []), (("x", "x"), ["a"])):
        reports = {
            r: {
                **make_report(0),
                "rank": r,
                "gpu": {**make_report(0)["gpu"], "count": 1, "uuid": uuids[r]},
                "pairs": [],
            }
            for r in range(2)
        }
        faults = find_faults(NodeReports({"a": [0, 1]}, reports, {}), PreflightOptions())
        assert [
            fault.node for fault in faults if "ranks 0, 1 have the same GPU" in fault.what
        ] == faulty, faults


def exclude_by_directories(*groups: str, **errors: dict[str, str]) -> list[str]:
    """Excluded nodes if run.dir is one directory for each group; letters are nodes."""
    changes: dict[int, dict[str, Any]] = {}
    for node in "".join(groups):
        changes[NODES.index(node)] = {
            "sees": list(next(group for group in groups if node in group)),
            "errors": errors.get(node, {}),
        }
    found = NodeReports(
        {node: [NODES.index(node)] for node in sorted("".join(groups))},
        {i: make_report(i, **c) for i, c in changes.items()},
        {},
    )
    faults = [
        fault for fault in find_faults(found, PreflightOptions()) if "all-reduce" not in fault.what
    ]
    assert len(groups) == 1 or any(
        "run.dir" in fault.what or "shared" in fault.what for fault in faults
    )
    return get_excluded_nodes(found, faults)


def test_the_node_without_the_mount_is_named_even_if_it_is_that_of_rank_0() -> None:
    assert exclude_by_directories("abcd") == []
    assert exclude_by_directories("bcd", "a") == ["a"] and exclude_by_directories("abd", "c") == [
        "c"
    ], "the largest group has the right one"
    assert exclude_by_directories("bcd", "a", a={"shared": "Read-only file system"}) == ["a"]
    assert (
        exclude_by_directories("ab", "cd") == []
        and exclude_by_directories("a", "b", "c", "d") == []
    ), "nobody shares: no node is the cause"
    assert exclude_by_directories("a", "b") == [], "either may be wrong"


def test_a_fault_of_all_nodes_excludes_none() -> None:
    full = {rank: {"disk": {"free": 0, "error": "No space left on device"}} for rank in range(4)}
    found = make_reports(full)
    faults = find_faults(found, PreflightOptions())
    assert (
        len([f for f in faults if f.state == "fail"]) == 4
        and get_excluded_nodes(found, faults) == []
    )


def test_of_two_nodes_the_slow_one_is_unknown_and_none_is_excluded() -> None:
    reports = {
        rank: make_report(rank, pairs=[{"with": "ab"[1 - rank], "speed": 1e9}]) for rank in (0, 1)
    }
    found = NodeReports({"a": [0], "b": [1]}, reports, {}, skews={"a": 20.0, "b": -20.0})
    faults = find_faults(found, PreflightOptions(min_bandwidth=10))
    assert (
        sorted({f.node for f in faults}) == ["a", "b"] and get_excluded_nodes(found, faults) == []
    )
    assert any("cannot be determined" in f.what and "40.00 s" in f.what for f in faults)
    assert not find_faults(NodeReports({"a": [0], "b": [1]}, reports, {}), PreflightOptions()), (
        "without a limit nothing is slow"
    )


def test_absolute_limits_are_checked_too() -> None:
    found = make_reports({}, skews={"a": 0.0, "b": 0.0, "c": -3.0, "d": 0.0})
    assert [f.node for f in find_faults(found, PreflightOptions(max_skew=2))] == [
        "c"
    ] and find_faults(found, PreflightOptions(max_skew=4)) == []
    assert {
        f.node for f in find_faults(make_reports({}), PreflightOptions(min_bandwidth=50))
    } == set(NODES)
    assert {f.node for f in find_faults(make_reports({}), PreflightOptions(min_disk=2000))} == set(
        NODES
    )


def test_an_all_reduce_of_all_ranks_that_hangs_is_reported_once_and_excludes_none() -> None:
    found = make_reports({rank: {"errors": {ALL: "not done within 65 s"}} for rank in (0, 1, 2)})
    faults = find_faults(found, PreflightOptions())
    assert (
        [f.node for f in faults] == [""]
        and "rank 0 and 2 more" in faults[0].what
        and get_excluded_nodes(found, faults) == []
    )


def test_a_pair_that_fails_alone_is_not_attributed_to_a_node() -> None:
    broken = {
        0: {"pairs": [{"with": "b", "error": "refused"}, {"with": "c", "speed": 20e9}]},
        1: {"pairs": [{"with": "a", "error": "refused"}, {"with": "d", "speed": 20e9}]},
    }
    faults = find_faults(make_reports(broken), PreflightOptions())
    assert [f.node for f in faults] == [""] and "between a and b" in faults[0].what


def test_an_environment_that_differs_is_a_warning_about_no_node() -> None:
    faults = find_faults(make_reports({1: {"environment": {}}}), PreflightOptions())
    assert [(f.state, f.node) for f in faults] == [("warn", "")] and "NCCL_DEBUG" in faults[0].what


def test_needs_of_the_recipe_are_compared_with_what_is_free() -> None:
    needs = {
        "parameters": 1,
        "trainable": 1,
        "gpu": 90 * GIB,
        "host": 600 * GIB,
        "checkpoint": GIB,
        "disk": 2000 * GIB,
    }
    text = " | ".join(
        f.what for f in find_faults(make_reports({}, needs=needs), PreflightOptions())
    )
    assert (
        "GiB of GPU memory free, the recipe needs 90" in text
        and "checkpoints and the model need about 2000" in text
    )
    assert "the recipe needs about 600" in text


@pytest.mark.seconds
def test_needs_are_the_sum_of_weights_gradients_and_optimizer_state() -> None:
    align = load_config(Path("stage1_image"), ["model.preset=onellm-7b"])
    needs = estimate_needs(align, 16, gpus=True)
    assert needs.parameters == pytest.approx(7.6e9, rel=0.05) and needs.trainable < 1e9
    assert needs.checkpoint == 12 * needs.trainable
    assert needs.gpu == pytest.approx((2 * needs.parameters + 16 * needs.trainable) / 16)
    tune = load_config(Path("tune"), ["model.preset=onellm-7b"])
    assert estimate_needs(tune, 16, gpus=True).trainable == pytest.approx(6.74e9, rel=0.01)
    on_cpu = estimate_needs(align, 16, gpus=False)
    assert on_cpu.gpu == 0 and on_cpu.host == needs.gpu
    with pytest.raises(UsageError, match="no model in"):
        estimate_needs(load_config(Path("stage1_image"), ["model.path=/nowhere"]), 16, gpus=True)


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8, 17])
def test_every_node_gets_partners_but_one_at_a_time(count: int) -> None:
    nodes = [f"n{i}" for i in range(count)]
    met: dict[str, set[str]] = {node: set() for node in nodes}
    for pairs in make_rounds(nodes):
        busy = [node for pair in pairs for node in pair]
        assert len(busy) == len(set(busy)) and set(busy) <= set(nodes)
        for a, b in pairs:
            met[a].add(b)
            met[b].add(a)
    assert min(len(others) for others in met.values()) >= min(2, count - 1)


def test_one_node_alone_has_no_pairs() -> None:
    assert [pair for pairs in make_rounds(["a"]) for pair in pairs] == []


def test_versions_that_differ_are_grouped_by_value() -> None:
    found = find_differences(
        {"a": {"torch": "1", "x": "1"}, "b": {"torch": "1"}, "c": {"torch": "2", "x": "1"}}
    )
    assert found == {
        "torch": {"1": ["a", "b"], "2": ["c"]},
        "x": {"1": ["a", "c"], "not set": ["b"]},
    }
    assert get_environment({"NCCL_DEBUG": "1", "HOME": "/", "NCCL_SOCKET_IFNAME": "eth0"}) == {
        "NCCL_DEBUG": "1"
    }


def test_a_changed_source_file_changes_the_digest(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    before = compute_code_digest(tmp_path)
    (tmp_path / "a.py").write_text("x = 2\n")
    assert len(before) == 12 and compute_code_digest(tmp_path) != before


def test_a_full_disk_or_a_file_in_its_place_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    assert "MB free" in probe_disk(tmp_path, "a", SimulatedFaults(free_bytes=1000))["error"]
    (tmp_path / "file").write_text("")
    assert "error" in probe_disk(tmp_path / "file" / "run", "a", SimulatedFaults())
    found = probe_disk(tmp_path / "run", "a", SimulatedFaults(), size=1 << 20)
    assert (
        found["write"] > 0
        and found["read"] > 0
        and "error" not in found
        and list((tmp_path / "run").iterdir()) == []
    )


def test_nvidia_smi_without_ecc_says_nothing() -> None:
    assert parse_ecc("0, 3, Yes, 41\n1, [N/A], [N/A], 40\nrubbish\n") == [
        {
            "index": "0",
            "ecc.errors.uncorrected.volatile.total": "3",
            "retired_pages.pending": "Yes",
            "temperature.gpu": "41",
        },
        {"index": "1", "temperature.gpu": "40"},
    ]


def test_nodes_have_the_names_that_slurm_gives_them() -> None:
    step = {"SLURM_STEP_NODELIST": "gpu[1-2]", "SLURM_STEP_TASKS_PER_NODE": "2,1"}
    assert (
        get_expected_nodes(step) == {0: "gpu1", 1: "gpu1", 2: "gpu2"}
        and get_expected_nodes({}) == {}
    )
    assert get_node_name(SimulatedFaults(), {"SLURMD_NODENAME": "gpu1"}) == "gpu1"
    assert (
        read_simulated_faults({PRETEND: '{"node": "x"}'}).node == "x"
        and read_simulated_faults({}) == SimulatedFaults()
    )
    with pytest.raises(UsageError, match="simulates"):
        read_simulated_faults({PRETEND: '{"nod": 1}'})
