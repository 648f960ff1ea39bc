"""The frames of a film: which stream is meant, where its frames are, and some of them decoded."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import av
import numpy as np

from onellm_dist.common.media_size import MediaSize
from onellm_dist.modalities.base import Part
from onellm_dist.modalities.io.containers import find_films, open_media
from onellm_dist.modalities.io.damage import note_damage
from onellm_dist.modalities.io.frame_pixels import make_upright_rgb
from onellm_dist.modalities.limits import LIMITS, check_duration, check_rate, check_size

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

_LIMITS = LIMITS["video"]
_SEEKABLE = {"mov", "mp4", "matroska", "webm", "flv"}
"""Containers that store presentation times and seek by them. AVI's are wrong for B-frames."""
_CONTRADICTION = 0.1
"""Difference from which the rate of the presentation times is believed, not the stated one."""


@dataclass(frozen=True)
class FrameTable:
    """Where the frames of a film are.

    Attributes:
        stream: index of the stream in the container.
        times: presentation times of all frames, ascending, in the stream's time base; 0, 1, 2, ...
            if `counted`.
        keys: presentation times of the key frames, ascending.
        rate: mean frames per second.
        counted: the container has no reliable times to seek by; a frame is found by its number,
            decoding all frames before it.
        missing: share of the frames that the container promises and does not have.
    """

    stream: int
    times: tuple[int, ...]
    keys: tuple[int, ...]
    rate: float
    counted: bool
    missing: float


def read_frames(
    part: Part, choose: Callable[[int, float], Sequence[int]]
) -> tuple[list[np.ndarray], list[float]]:
    """Read some frames of a film.

    Pictures that are attached (covers), thumbnails and data streams are not films. Of several films
    the one marked as default is read; of several of these the longest, then the largest, then the
    first. A film that is cut short is read as far as it goes, and a frame that cannot be decoded is
    replaced by the one before it, as players show it; both are noted as damage.

    Args:
        part: the file.
        choose: number of frames and frames per second -> indices of the wanted frames; a repeated
            index gives the same array again.

    Returns:
        Frames [H, W, 3] uint8 RGB, upright; and the second at which each is shown (its number over
        the mean rate).

    Raises:
        SampleError: the film cannot be read, exceeds the limits, or too much of it is missing.
    """
    name = f".{part.extension}"
    with open_media(part, "video") as container:
        table = _choose_film(container, name)
        if table.missing > 0:
            what = f"{name}: {table.missing:.0%} of the film is missing, its file is cut short"
            note_damage(what, table.missing)
        indices = choose(len(table.times), table.rate)
        wanted = sorted({table.times[i] for i in indices})
        found = {} if table.counted else _decode_by_seeking(container, table, wanted)
    missing = [t for t in wanted if t not in found]
    if missing:
        with open_media(part, "video") as container:  # again: some of these cannot seek
            nearest, replaced = _decode_in_order(container, table, missing)
        lost = [t for t in missing if t not in nearest or t in replaced]
        if lost:
            at = table.times.index(lost[0])
            what = f"{name}: frame {at} of {len(table.times)} cannot be decoded"
            note_damage(what, len(lost) / len(wanted) if nearest else 1.0)
        found |= nearest
    return [found[table.times[i]] for i in indices], [i / table.rate for i in indices]


def measure_film(part: Part) -> MediaSize:
    """Read width, height, frames and seconds of a film from its packets, without decoding frames.

    Raises:
        SampleError: as of `read_frames`.
    """
    with open_media(part, "video") as container:
        table = _choose_film(container, f".{part.extension}")
        film = _get_film(container, table).codec_context
        frames = len(table.times)
        return MediaSize(film.width, film.height, frames, frames / table.rate)


@dataclass
class _Packets:
    """What the packets of a stream say, in the order of the container."""

    times: list[int | None]
    keys: list[int]
    seen: int = 0
    """All packets, those that are not shown and those without bytes included."""
    end: int = 0
    """Where the last shown packet ends, in the stream's time base."""


def _choose_film(container: InputContainer, name: str) -> FrameTable:
    """The table of the film that is meant. Packets are read for it, not decoded."""
    films = find_films(container)
    for film in films:
        width, height = film.codec_context.width, film.codec_context.height
        if width and height and len(films) == 1:
            check_size(_LIMITS, width, height, name)
    packets = {film.index: _Packets([], []) for film in films}
    fault = _read_packets(container, films, packets)
    tables = [_make_table(container, film, packets[film.index], name) for film in films]
    usable = [(f, t) for f, t in zip(films, tables, strict=True) if t is not None]
    if not usable:
        raise fault or ValueError("it has no frames, or no number of frames a second")
    film, table = max(usable, key=lambda pair: _rate_film(*pair))
    check_size(_LIMITS, film.codec_context.width, film.codec_context.height, name)
    check_rate(_LIMITS, table.rate, name)
    check_duration(_LIMITS, len(table.times) / table.rate, name)
    if fault is not None and not table.missing:
        raise fault
    return table


def _rate_film(film: VideoStream, table: FrameTable) -> tuple[float, ...]:
    """Sort key: moving, default, long, large, early."""
    is_default = bool(film.disposition & av.stream.Disposition.default)
    size = film.codec_context.width * film.codec_context.height
    seconds = round(len(table.times) / table.rate, 1)
    return len(table.times) > 1, is_default, seconds, size, -film.index


def _read_packets(
    container: InputContainer, films: Sequence[VideoStream], packets: dict[int, _Packets]
) -> Exception | None:
    """Fill in the packets of these streams; returns the fault at which the container ends."""
    try:
        for packet in container.demux(*films):
            found = packets[packet.stream.index]
            found.seen += packet.size > 0 or packet.dts is not None  # not the one behind the end
            if packet.size and not packet.is_discard:
                found.times.append(packet.pts)
                found.end = max(found.end, (packet.pts or 0) + (packet.duration or 0))
                if packet.is_keyframe and packet.pts is not None:
                    found.keys.append(packet.pts)
    except av.error.FFmpegError as error:
        return error
    return None


def _make_table(
    container: InputContainer, film: VideoStream, packets: _Packets, name: str
) -> FrameTable | None:
    """The table of a stream; None if it has no frames or no rate."""
    times = packets.times
    known = sorted({t for t in times if t is not None})
    complete = len(known) == len(times)
    step = float(film.time_base or 0)
    stated = film.average_rate or film.guessed_rate
    rate = _choose_rate(float(stated or 0), known if complete else [], step)
    if not times or not rate:
        return None
    end = (known[-1] * step + 1 / rate) if known else len(times) / rate
    missing = _compute_missing(container, film, packets, end)
    if not complete or not _SEEKABLE & set(container.format.name.split(",")):
        return FrameTable(film.index, tuple(range(len(times))), (), rate, True, missing)
    keys = tuple(sorted(packets.keys))
    return FrameTable(film.index, tuple(known), keys, rate, False, missing)


def _choose_rate(stated: float, times: Sequence[int], step: float) -> float:
    """Frames a second: as stated, unless the presentation times contradict it."""
    span = (times[-1] - times[0]) * step if len(times) > 1 else 0.0
    if span <= 0:
        return stated
    measured = (len(times) - 1) / span
    return stated if abs(stated - measured) <= _CONTRADICTION * measured else measured


def _compute_missing(
    container: InputContainer, film: VideoStream, packets: _Packets, end: float
) -> float:
    """Share of a film that its container promises and does not have; 0 where it promises none."""
    formats, seen = set(container.format.name.split(",")), packets.seen
    if film.frames > 0 and formats & {"mov", "mp4", "avi"}:
        if seen >= film.frames or not film.duration or "avi" in formats:
            return max(0.0, 1 - seen / film.frames)
        # An edit list leaves stored samples out on purpose; the duration is that of its edits,
        # counted from 0, or from the first frame where nothing is left out.
        starts = film.start_time or 0 if packets.end > film.duration * (1 + 1 / seen) else 0
        share = 1 - (packets.end - starts) / film.duration
        return share if share > 1 / max(seen, 20) else 0.0
    promised = _parse_seconds(film.metadata.get("DURATION", ""))
    if not promised and len(container.streams) == 1 and formats & {"matroska", "webm"}:
        promised = (container.duration or 0) / av.time_base
    share = 1 - end / promised if promised > 0 else 0.0
    return share if share > 1 / max(seen, 20) else 0.0  # the last frame's own length is not stated


def _parse_seconds(text: str) -> float:
    """Parse `00:01:02.500`; 0 for anything else."""
    try:
        hours, minutes, seconds = (float(field) for field in text.split(":"))
    except ValueError:
        return 0.0
    return hours * 3600 + minutes * 60 + seconds


def _demux(container: InputContainer, film: VideoStream) -> Iterator[Packet[VideoStream]]:
    """The packets of a stream, up to the fault at which the container ends."""
    try:
        yield from container.demux(film)
    except av.error.FFmpegError:
        return


def _get_film(container: InputContainer, table: FrameTable) -> VideoStream:
    film: VideoStream = container.streams[table.stream]  # type: ignore[assignment]
    film.codec_context.thread_count = 1  # workers are the parallelism
    return film


def _decode_by_seeking(
    container: InputContainer, table: FrameTable, wanted: Sequence[int]
) -> dict[int, np.ndarray]:
    """The frames at these ascending times; each is decoded from the last key frame before it."""
    film = _get_film(container, table)
    groups: dict[int, set[int]] = {}
    for time in wanted:
        at = bisect_right(table.keys, time)
        groups.setdefault(table.keys[at - 1] if at else table.times[0], set()).add(time)
    found: dict[int, np.ndarray] = {}
    for key, times in groups.items():
        try:
            container.seek(key, stream=film, backward=True)
            for frame in _decode_needed(container, film, times):
                if frame.pts in times and not frame.is_corrupt:
                    found[frame.pts] = make_upright_rgb(frame)
                    if times <= found.keys():
                        break
        except av.error.FFmpegError:  # what is missing is looked for in order
            continue
    return found


def _decode_needed(
    container: InputContainer, film: VideoStream, times: set[int]
) -> Iterator[VideoFrame]:
    """Decode frames from here on, without those that nobody needs.

    B-frames between the wanted ones are half of a usual H.264 video. No other frame is predicted
    from them, so that leaving them out changes no other frame.
    """
    for packet in container.demux(film):
        film.codec_context.skip_frame = "DEFAULT" if packet.pts in times else "NONREF"
        yield from packet.decode()


def _decode_in_order(
    container: InputContainer, table: FrameTable, wanted: Sequence[int]
) -> tuple[dict[int, np.ndarray], set[int]]:
    """Decode a film from its beginning, passing over packets that cannot be decoded.

    Returns:
        The frames at these ascending times (numbers, if `counted`), and those times at which the
        nearest one stands in: the frame before, or the first of all.
    """
    found: dict[int, np.ndarray] = {}
    replaced: set[int] = set()
    waiting, last = list(wanted), None
    for time, frame in _iterate_frames(container, table):
        if time is None or frame.is_corrupt:
            continue
        while waiting and waiting[0] < time:
            replaced.add(waiting[0])
            found[waiting.pop(0)] = make_upright_rgb(last or frame)
        if waiting and waiting[0] == time:
            found[waiting.pop(0)] = make_upright_rgb(frame)
        if not waiting:
            break
        last = frame
    if last is not None:
        replaced.update(waiting)
        found |= dict.fromkeys(waiting, make_upright_rgb(last)) if waiting else {}
    return found, replaced


def _iterate_frames(
    container: InputContainer, table: FrameTable
) -> Iterator[tuple[int | None, VideoFrame]]:
    """Yield time (or number) and frame of all frames that can be decoded."""
    film, number = _get_film(container, table), 0
    for packet in _demux(container, film):
        try:
            frames = packet.decode()
        except av.error.FFmpegError:
            number += table.counted  # its frame is lost
            continue
        for frame in frames:
            yield (number if table.counted else frame.pts), frame
            number += 1
