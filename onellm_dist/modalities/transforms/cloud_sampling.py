"""Farthest-point sampling and nearest neighbours, for OneLLM's point tokenizer (paper C.1)."""

from __future__ import annotations

import numpy as np
import torch

_STRIDE = 1024
"""Threads of the reference's CUDA kernel (`sampling_gpu.cu`), which decides how ties break."""

_CLOUDS = 8
"""Clouds whose distances are computed together: 32 MiB each."""


def sample_farthest_points(coordinates: torch.Tensor, count: int) -> torch.Tensor:
    """Choose points that are far from each other, beginning with point 0.

    Each next point is the one whose distance to the nearest chosen point is greatest. Ties go to
    the smaller k mod 1024, then to the smaller k, as in the reference's CUDA kernel. A cloud with
    fewer distinct points than `count` repeats point 0.

    Args:
        coordinates: [n, N, 3] fp32, N a multiple of 1024; n = 0 is allowed.
        count: how many points to choose.

    Returns:
        Indices [n, count] int64.
    """
    n, total, _ = coordinates.shape
    if total % _STRIDE:
        raise ValueError(
            f"sample_farthest_points needs a multiple of {_STRIDE} points, got {total}"
        )
    if not n:  # an absent modality in every micro-batch: thousands of empty kernels otherwise
        return coordinates.new_empty((0, count), dtype=torch.int64)
    rows = total // _STRIDE
    # Planar [n, 3, N], in an order in which the first maximum is the one the reference keeps.
    planar = coordinates.float().view(n, rows, _STRIDE, 3).permute(0, 3, 2, 1).reshape(n, 3, total)
    if planar.device.type == "cpu":
        chosen = torch.empty((n, count), dtype=torch.int64)
        for i, cloud in enumerate(planar.numpy()):
            chosen[i] = torch.from_numpy(_farthest_numpy(cloud, count))
    else:
        chosen = _farthest_torch(planar, count)
    return chosen % rows * _STRIDE + chosen // rows


def _farthest_numpy(planar: np.ndarray, count: int) -> np.ndarray:
    """One cloud [3, N] in place: the fastest on a CPU, because its data stays in the cache."""
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
        if nearest[last] == 0:  # every point is chosen or equals a chosen one: point 0 from here on
            chosen[i] = 0
            break
    return chosen


def _farthest_torch(planar: torch.Tensor, count: int) -> torch.Tensor:
    """All clouds [n, 3, N] together, without synchronising with the device."""
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


def find_nearest_neighbours(
    coordinates: torch.Tensor, centres: torch.Tensor, count: int
) -> torch.Tensor:
    """Find the points nearest to each centre, nearest first; the centre itself is one of them.

    If several points are at exactly the same distance, which of them are among the last is fixed
    for one kind of device but not across kinds (the reference's `torch.topk` leaves it open too).

    Args:
        coordinates: [n, N, 3] fp32; n = 0 is allowed.
        centres: [n, C] int64 indices into the N points.
        count: neighbours per centre.

    Returns:
        Indices [n, C, count] int64.
    """
    at = coordinates.float().gather(1, centres[..., None].expand(*centres.shape, 3))
    find = _nearest_tree if coordinates.device.type == "cpu" else _nearest_torch
    return find(coordinates.float(), at, count)


def _nearest_tree(coordinates: torch.Tensor, at: torch.Tensor, count: int) -> torch.Tensor:
    """[n, N, 3] and [n, C, 3] -> [n, C, count] by a k-d tree.

    It takes 6 ms per cloud where distances and topk take 50. SciPy is imported here because that
    takes half a second, which commands without a model need not spend.
    """
    from scipy.spatial import cKDTree

    found = torch.empty((*at.shape[:2], count), dtype=torch.int64)
    for i in range(len(coordinates)):
        found[i] = torch.from_numpy(cKDTree(coordinates[i].numpy()).query(at[i].numpy(), count)[1])
    return found


def _nearest_torch(coordinates: torch.Tensor, at: torch.Tensor, count: int) -> torch.Tensor:
    """Find the nearest points on a GPU, a few clouds at a time.

    It uses exact differences and not torch.cdist, whose matrix form loses the digits that
    distinguish near points.
    """
    found = torch.empty((*at.shape[:2], count), dtype=torch.int64, device=at.device)
    for start in range(0, len(at), _CLOUDS):
        rows = slice(start, start + _CLOUDS)
        distance = (at[rows, :, None, 0] - coordinates[rows, None, :, 0]).square_()
        for axis in (1, 2):
            distance += (at[rows, :, None, axis] - coordinates[rows, None, :, axis]).square_()
        found[rows] = distance.topk(count, dim=2, largest=False).indices
    return found
