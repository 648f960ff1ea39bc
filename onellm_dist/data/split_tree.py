"""Mixtures of integer weights whose period is too long to lay out: positions by arithmetic.

The datasets are the leaves of a binary tree (Huffman's, so that large weights lie near the root).
Of the n positions that reach a node with the weights l and r below it, floor((n l + h) / (l + r))
with h = floor((l + r) / 2) go left. Each node therefore stays within half a sample of its share,
a dataset within 2 samples of weight x length, and a complete period has exactly the weights.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
_PRODUCT = 1 << 31
"""Periods up to this keep every product of two counts within int64; longer ones use Python's
integers."""


class _Node(NamedTuple):
    """An inner node: the weights below it, and its children (a node, or a dataset's number)."""

    left: int
    right: int
    children: tuple[_Node | int, _Node | int]

    @property
    def total(self) -> int:
        """The weight of the node."""
        return self.left + self.right

    @property
    def half(self) -> int:
        """What rounds a share to the nearest integer."""
        return self.total // 2


class SplitTree:
    """One period of a mixture, computed instead of stored.

    Args:
        counts: positive weights of at least two datasets; the period is their sum.
    """

    def __init__(self, counts: Sequence[int]) -> None:
        self._datasets = len(counts)
        self._root = _build_tree(counts)
        self._type = np.dtype(np.int64 if sum(counts) <= _PRODUCT else object)
        self._paths: dict[int, list[tuple[_Node, bool]]] = {}
        self._note_paths(self._root, [])

    def locate(self, offsets: Ints) -> tuple[Ints, Ints]:
        """Find the dataset at offsets in the period, and how often it occurred before.

        Args:
            offsets: [n] offsets, each in 0 .. period - 1.

        Returns:
            [n] datasets, and [n] earlier occurrences of that dataset in the period.
        """
        dataset, earlier = np.empty(len(offsets), np.int64), np.empty(len(offsets), np.int64)
        waiting: list[tuple[_Node | int, Ints, Ints]] = [
            (self._root, np.arange(len(offsets)), offsets.astype(self._type))
        ]
        while waiting:
            node, where, n = waiting.pop()
            if isinstance(node, int):
                dataset[where], earlier[where] = node, n.astype(np.int64)
                continue
            before = (n * node.left + node.half) // node.total
            goes_left = ((n + 1) * node.left + node.half) // node.total > before
            goes_left = goes_left.astype(bool)
            waiting.append((node.children[0], where[goes_left], before[goes_left]))
            waiting.append((node.children[1], where[~goes_left], (n - before)[~goes_left]))
        return dataset, earlier

    def find(self, dataset: int, nth: Ints) -> Ints:
        """Find the offsets of occurrences of a dataset: the inverse of `locate`.

        Args:
            dataset: index of the dataset.
            nth: [n] occurrences within the period, from 0.

        Returns:
            [n] offsets in the period.
        """
        n = nth.astype(self._type)
        for node, is_left in reversed(self._paths[dataset]):
            # The smallest offset behind which the child has had n + 1 positions.
            weight = node.left if is_left else node.right
            reached = (n + 1) * node.total - node.half
            if not is_left:
                reached = n * node.total + node.half + 1
            n = -(-reached // weight) - 1
        return n.astype(np.int64)

    def count(self, length: int) -> list[int]:
        """Return how often each dataset occurs in the first `length` positions of the period."""
        counts = [0] * self._datasets
        waiting: list[tuple[_Node | int, int]] = [(self._root, length)]
        while waiting:
            node, n = waiting.pop()
            if isinstance(node, int):
                counts[node] = n
                continue
            left = (n * node.left + node.half) // node.total
            waiting += [(node.children[0], left), (node.children[1], n - left)]
        return counts

    def _note_paths(self, node: _Node | int, above: list[tuple[_Node, bool]]) -> None:
        if isinstance(node, int):
            self._paths[node] = above
            return
        for child, is_left in zip(node.children, (True, False), strict=True):
            self._note_paths(child, [*above, (node, is_left)])


def _build_tree(counts: Sequence[int]) -> _Node:
    """Join the two smallest weights until one node is left; of equal ones, those made first."""
    heap: list[tuple[int, int, _Node | int]] = [(count, j, j) for j, count in enumerate(counts)]
    heapq.heapify(heap)
    for number in range(len(counts), 2 * len(counts) - 1):
        small, _, first = heapq.heappop(heap)
        large, _, second = heapq.heappop(heap)
        heapq.heappush(heap, (small + large, number, _Node(large, small, (second, first))))
    root = heap[0][2]
    assert isinstance(root, _Node)
    return root
