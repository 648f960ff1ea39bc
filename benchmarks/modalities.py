"""CPU time of one sample of each modality, and its ratio to a peer's code for the same result.

    OMP_NUM_THREADS=1 python benchmarks/modalities.py

The media are made here (noise and gradients, which compress badly: real files decode faster). Times
are CPU seconds of one thread, the median of several measurements, so that they hold on a busy
machine too.
"""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import av
import numpy as np
import soundfile
import torch
from PIL import Image
from torchvision import transforms

from onellm_dist.modalities import Part, get_modality
from onellm_dist.modalities.point import PointTokenizer
from onellm_dist.modalities.transforms.cloud_sampling import (
    _farthest_torch,
    find_nearest_neighbours,
    sample_farthest_points,
)
from onellm_dist.modalities.transforms.crops import CLIP_MEAN, CLIP_STD

RNG = np.random.default_rng(0)


def measure_ms(work: Callable[[], Any], repeats: int = 9) -> float:
    """Median CPU milliseconds of this thread."""
    work()
    times = []
    for _ in range(repeats):
        start = time.thread_time()
        work()
        times.append(time.thread_time() - start)
    return statistics.median(times) * 1000


def photo(width: int, height: int) -> Image.Image:
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.stack(
        [columns * 255 / width, rows * 255 / height, (rows + columns) % 256], -1
    ) + RNG.normal(0, 8, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, form: str) -> Part:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return Part(form.lower(), buffer.getvalue())


def npy(array: np.ndarray) -> Part:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return Part("npy", buffer.getvalue())


def flac(seconds: int) -> Part:
    buffer = io.BytesIO()
    soundfile.write(buffer, RNG.normal(0, 0.1, 32000 * seconds), 32000, format="FLAC")
    return Part("flac", buffer.getvalue())


def video(width: int, height: int, frames: int, fps: int) -> Part:
    """H.264 with x264's defaults (3 B-frames, a key frame every 250)."""
    buffer, picture = io.BytesIO(), np.asarray(photo(width, height))
    with av.open(buffer, "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=fps, options={"preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i in range(frames):
            out.mux(
                stream.encode(
                    av.VideoFrame.from_ndarray(np.roll(picture, i * 3, axis=1), format="rgb24")
                )
            )
        out.mux(stream.encode())
    return Part("mp4", buffer.getvalue())


def make_samples() -> dict[str, tuple[str, dict[str, Part]]]:
    """The samples that are measured: name to modality and parts."""
    picture = encoded(photo(512, 384), "JPEG")
    return {
        "image 384x256 JPEG": ("image", {"image": encoded(photo(384, 256), "JPEG")}),
        "image 1024x768 JPEG": ("image", {"image": encoded(photo(1024, 768), "JPEG")}),
        "image 512x512 WebP": ("image", {"image": encoded(photo(512, 512), "WEBP")}),
        "video 596x336 10 s H.264": ("video", {"video": video(596, 336, 250, 25)}),
        "audio 10 s FLAC 32 kHz": ("audio", {"audio": flac(10)}),
        "audio 60 s FLAC 32 kHz": ("audio", {"audio": flac(60)}),
        "point 8192 npy": ("point", {"point": npy(RNG.random((8192, 6)).astype(np.float32))}),
        "depth 512x384 JPEG + PNG": (
            "depth",
            {"image": picture, "depth": encoded(photo(512, 384).convert("L"), "PNG")},
        ),
        "normal 512x384 JPEG + PNG": (
            "normal",
            {"image": picture, "normal": encoded(photo(512, 384), "PNG")},
        ),
        "imu [6, 400] npy": ("imu", {"imu": npy(RNG.normal(size=(6, 400)))}),
        "fmri [3, 15724] npy": (
            "fmri",
            {"fmri": npy(RNG.normal(size=(3, 15724)).astype(np.float32))},
        ),
    }


def decode_everything(part: Part) -> list[np.ndarray]:
    """The peer of video: every frame to RGB, then choose."""
    with av.open(io.BytesIO(part.data), "r") as container:
        container.streams.video[0].codec_context.thread_count = 1
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def plain_groups(
    values: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, index: torch.Tensor
) -> torch.Tensor:
    """The peer of the point tokenizer's embedding: everything wide, then the maximum."""
    groups = torch.stack([cloud[rows] for cloud, rows in zip(values, index, strict=True)])
    return (groups @ weight.t() + bias).amax(2)


def measure_ratios(media: dict[str, tuple[str, dict[str, Part]]]) -> None:
    """Print our times beside those of a peer's way to the same numbers."""
    image, picture = get_modality("image"), media["image 1024x768 JPEG"][1]
    theirs = transforms.Compose(
        [
            transforms.Resize(224, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize(CLIP_MEAN, CLIP_STD),
        ]
    )
    print_ratio(
        "image, eval, torchvision",
        lambda: image.transform(image.decode(picture, {}), train=False, rng=RNG),
        lambda: theirs(Image.open(io.BytesIO(picture["image"].data)).convert("RGB")),
    )
    clip = media["video 596x336 10 s H.264"][1]
    print_ratio(
        "video, decode all frames",
        lambda: get_modality("video").decode(clip, {}),
        lambda: decode_everything(clip["video"]),
    )
    values = torch.rand(1, 8192, 6)
    colours = values[..., 3:].contiguous()
    centres = sample_farthest_points(colours, 1024)
    at = colours.gather(1, centres[..., None].expand(-1, -1, 3))
    print_ratio(
        "point, neighbours by cdist + topk",
        lambda: find_nearest_neighbours(colours, centres, 32),
        lambda: torch.cdist(at, colours).topk(32, dim=2, largest=False),
    )
    none = torch.empty((0, 8192, 3))
    print_ratio(
        "point, farthest points of no clouds, by the loop",
        lambda: sample_farthest_points(none, 1024),
        lambda: _farthest_torch(none.transpose(1, 2), 1024),
    )
    index, module = find_nearest_neighbours(colours, centres, 32), PointTokenizer(1024)
    assert module.conv.bias is not None
    weight, bias = module.conv.weight.flatten(1), module.conv.bias
    groups = values[0][index[0]]
    print_ratio(
        "point, embedding forward + backward, width 1024",
        lambda: module.conv(groups).sum().backward(),
        lambda: plain_groups(values, weight, bias, index).sum().backward(),
    )


def print_ratio(name: str, ours: Callable[[], Any], theirs: Callable[[], Any]) -> None:
    mine, peer = measure_ms(ours), measure_ms(theirs)
    print(f"| {name} | {mine:.1f} | {peer:.1f} | {peer / mine:.2f} x |", flush=True)


def main() -> None:
    torch.set_num_threads(1)
    media = make_samples()
    print("| sample | decode ms | transform ms | preview ms | samples/s on one core |")
    print("|---|---|---|---|---|")
    for name, (modality_name, parts) in media.items():
        modality = get_modality(modality_name)
        raw = modality.decode(parts, {})
        decode = measure_ms(partial(modality.decode, parts, {}))
        transform = measure_ms(partial(modality.transform, raw, train=True, rng=RNG))
        preview = measure_ms(partial(modality.preview, raw))
        rate = 1000 / (decode + transform)
        print(
            f"| {name} | {decode:.1f} | {transform:.1f} | {preview:.1f} | {rate:.0f} |", flush=True
        )
    print("\n| the peer's way | ours ms | peer ms | faster by |\n|---|---|---|---|")
    measure_ratios(media)


if __name__ == "__main__":
    main()
