"""Farthest-point sampling and nearest neighbours on point clouds, as OneLLM's point tokenizer needs them (paper C.1)."""

from __future__ import annotations

import numpy as np
import torch

_STRIDE = 1024
"""Threads of the reference's CUDA kernel (`sampling_gpu.cu`): equal distances go to the smaller k mod 1024, then the smaller k."""

_CLOUDS = 8


def farthest_points(coordinates: torch.Tensor, count: int) -> torch.Tensor:
    """Indices [n, count] int64 of points that are far from each other, the first of them point 0.

    Each next point is the one whose distance to the nearest chosen one is greatest. Ties go to the smaller k mod 1024,
    then to the smaller k, as in the reference's CUDA kernel; a cloud with fewer distinct points than `count` repeats point 0.

    Args:
        coordinates: [n, N, 3] fp32, N a multiple of 1024. n = 0 is allowed.
        count: points to choose.
    """
    n, total, _ = coordinates.shape
    if total % _STRIDE:
        raise ValueError(f"farthest_points needs a multiple of {_STRIDE} points, got {total}")
    rows = total // _STRIDE
    # Planar [n, 3, N], reordered so that the first maximum is the one the reference's reduction keeps.
    planar = coordinates.float().view(n, rows, _STRIDE, 3).permute(0, 3, 2, 1).reshape(n, 3, total)
    if planar.device.type == "cpu":
        chosen = torch.empty((n, count), dtype=torch.int64)
        for i, cloud in enumerate(planar.numpy()):
            chosen[i] = torch.from_numpy(_farthest_numpy(cloud, count))
    else:
        chosen = _farthest_torch(planar, count)
    return chosen % rows * _STRIDE + chosen // rows


def _farthest_numpy(planar: np.ndarray, count: int) -> np.ndarray:
    """One cloud [3, N]; one at a time in place is the fastest on a CPU (its working set stays in the cache)."""
    chosen = np.zeros(count, np.int64)
    nearest = np.full(planar.shape[1], 1e10, np.float32)
    square, distance = np.empty_like(planar), np.empty_like(nearest)
    last = 0
    for i in range(1, count):
        np.subtract(planar, planar[:, last : last + 1], out=square)
        np.multiply(square, square, out=square)
        np.add(square[0], square[1], out=distance)
        np.add(distance, square[2], out=distance)
        np.minimum(nearest, distance, out=nearest)
        last = int(nearest.argmax())
        chosen[i] = last
        if (
            nearest[last] == 0
        ):  # every point is chosen or equals one that is: the rest stays at point 0
            chosen[i] = 0
            break
    return chosen


def _farthest_torch(planar: torch.Tensor, count: int) -> torch.Tensor:
    """All clouds [n, 3, N] together, without a synchronisation with the device."""
    n, _, total = planar.shape
    chosen = torch.zeros((n, count), dtype=torch.int64, device=planar.device)
    nearest = planar.new_full((n, total), 1e10)
    last = chosen[:, :1]
    for i in range(1, count):
        centre = planar.gather(2, last[:, None].expand(n, 3, 1))
        square = (planar - centre).square_()
        torch.minimum(nearest, square[:, 0].add_(square[:, 1]).add_(square[:, 2]), out=nearest)
        last = nearest.argmax(1, keepdim=True)
        chosen[:, i] = last[:, 0]
    return chosen


def nearest_neighbours(
    coordinates: torch.Tensor, centres: torch.Tensor, count: int
) -> torch.Tensor:
    """Indices [n, C, count] int64 of the `count` points nearest to each centre, nearest first (the centre itself is one).

    Which of several points at exactly the same distance come last in is fixed for one device kind, but not across kinds
    (the reference's `torch.topk` leaves it open too).

    Args:
        coordinates: [n, N, 3] fp32. n = 0 is allowed.
        centres: [n, C] int64 indices into the N points.
        count: neighbours of each centre.
    """
    at = coordinates.float().gather(1, centres[..., None].expand(*centres.shape, 3))
    find = _nearest_tree if coordinates.device.type == "cpu" else _nearest_torch
    return find(coordinates.float(), at, count)


def _nearest_tree(coordinates: torch.Tensor, at: torch.Tensor, count: int) -> torch.Tensor:
    """[n, N, 3] and [n, C, 3] -> [n, C, count]; a k-d tree takes 6 ms a cloud where distances and topk take 50."""
    from scipy.spatial import (
        cKDTree,
    )  # half a second of import, which commands without a model need not wait for

    found = torch.empty((*at.shape[:2], count), dtype=torch.int64)
    for i in range(len(coordinates)):
        found[i] = torch.from_numpy(cKDTree(coordinates[i].numpy()).query(at[i].numpy(), count)[1])
    return found


def _nearest_torch(coordinates: torch.Tensor, at: torch.Tensor, count: int) -> torch.Tensor:
    """The same on the device, a few clouds at a time: their distances take 32 MiB each.

    From exact differences and not by torch.cdist, whose matrix form loses the digits that tell near points apart.
    """
    found = torch.empty((*at.shape[:2], count), dtype=torch.int64, device=at.device)
    for start in range(0, len(at), _CLOUDS):
        rows = slice(start, start + _CLOUDS)
        distance = (at[rows, :, None, 0] - coordinates[rows, None, :, 0]).square_()
        for axis in (1, 2):
            distance += (at[rows, :, None, axis] - coordinates[rows, None, :, axis]).square_()
        found[rows] = distance.topk(count, dim=2, largest=False).indices
    return found
