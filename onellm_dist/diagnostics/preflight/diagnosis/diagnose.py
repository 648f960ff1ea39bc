"""All faults of a preflight, and the nodes to leave out."""

from __future__ import annotations

from collections.abc import Sequence

from onellm_dist.diagnostics.preflight.diagnosis import (
    attendance,
    gpus,
    links,
    node_settings,
    storage,
)
from onellm_dist.diagnostics.preflight.diagnosis.fault import Fault
from onellm_dist.diagnostics.preflight.diagnosis.reports import NodeReports
from onellm_dist.diagnostics.preflight.options import PreflightOptions


def find_faults(found: NodeReports, options: PreflightOptions) -> list[Fault]:
    """All faults, the worst first."""
    faults = [
        *attendance.check_attendance(found),
        *attendance.check_errors(found),
        *gpus.check_gpus(found),
        *links.check_links(found, options),
        *storage.check_disks(found, options),
        *storage.check_shared_directory(found),
        *node_settings.check_clocks(found, options),
        *node_settings.check_versions(found),
        *node_settings.check_limits(found),
        *node_settings.check_needs(found),
    ]
    return sorted(faults, key=lambda fault: (fault.state != "fail", not fault.exclude))


def get_excluded_nodes(found: NodeReports, faults: Sequence[Fault]) -> list[str]:
    """The nodes to leave out; none if it would be all of them: then they are not the cause."""
    bad = {fault.node for fault in faults if fault.exclude and fault.state == "fail" and fault.node}
    return [] if bad >= set(found.nodes) else sorted(bad)
