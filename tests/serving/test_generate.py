"""`onellm generate` on a toy model: every modality, several at once, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from onellm_dist.cli import main as cli
from onellm_dist.common.errors import EXIT_DONE, EXIT_FAILED, EXIT_USAGE, SampleError, UsageError
from onellm_dist.data.text import STOP
from onellm_dist.modalities import all_modalities
from onellm_dist.model import OneLLMForConditionalGeneration
from onellm_dist.model.presets import load_model
from onellm_dist.serving import generate as g
from onellm_dist.serving import questions
from onellm_dist.serving.media import read_files
from onellm_dist.testing.integration.ask import ask_questions


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy model with random weights."""
    folder = tmp_path_factory.mktemp("toy") / "model"
    model, processor = load_model(path=None, preset="toy", seed=3)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(model_dir: Path) -> tuple[Any, Any]:
    """That model and its processor."""
    return load_model(path=model_dir, preset=None, seed=0)


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One small real file of every modality."""
    folder = tmp_path_factory.mktemp("media")
    rng = np.random.default_rng(0)

    def picture(name: str) -> Path:
        Image.fromarray(rng.integers(0, 255, (60, 80, 3), dtype=np.uint8)).save(folder / name)
        return folder / name

    def array(name: str, shape: tuple[int, ...]) -> Path:
        np.save(folder / name, rng.random(shape, dtype=np.float32))
        return folder / name

    with av.open(str(folder / "clip.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height = 64, 48
        for n in range(20):
            container.mux(
                stream.encode(
                    av.VideoFrame.from_ndarray(
                        np.full((48, 64, 3), n * 10, np.uint8), format="rgb24"
                    )
                )
            )
        container.mux(stream.encode())
    soundfile.write(folder / "tone.wav", np.sin(np.arange(16000) / 8), 16000)
    picture("scene.jpg")
    return {
        "image": folder / "scene.jpg",
        "video": folder / "clip.mp4",
        "audio": folder / "tone.wav",
        "point": array("cloud.npy", (8192, 6)),
        "depth": picture("scene.depth.png"),
        "normal": picture("scene.normal.png"),
        "imu": array("move.npy", (6, 400)),
        "fmri": array("brain.npy", (3, 15724)),
    }


def run(arguments: list[Any], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `onellm generate ...`."""
    with pytest.raises(SystemExit) as ended:
        cli(["generate", *map(str, arguments)])
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out, said.err


def test_an_empty_answer_is_no_silence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = g.Answer(text="", tokens=1, ended="eos", seconds=0.1)
    monkeypatch.setattr(questions, "answer_questions", lambda _, asked, **keys: [(asked[0], empty)])
    assert run(["model"], capsys) == (0, "\n", "(the answer is empty; it was ended by eos)\n")


@pytest.mark.seconds
def test_an_answer_comes_in_pieces(loaded: tuple[Any, Any], media: dict[str, Path]) -> None:
    model, processor = loaded
    pieces: list[str] = []
    for offset in g.OFFSETS:
        pieces.clear()
        answer = g.generate(
            model,
            processor.tokenizer,
            g.build_prompt("What is it?", "auto"),
            read_files([("imu", media["imu"])]),
            decoding=g.DecodingOptions(max_new_tokens=20, decode_offset=offset),
            on_text=pieces.append,
        )
        assert "".join(pieces) == answer.text
        assert (len(pieces) > 3) == (offset == "correct")


@pytest.mark.seconds
def test_several_prompts_and_lines_of_a_file(
    model_dir: Path, media: dict[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    short = ["--max-new-tokens", 6]
    asked = [model_dir, "What?", "Who?", "--imu", media["imu"], *short]
    code, text, _ = run(asked, capsys)
    code_json, out, _ = run([*asked, "--json"], capsys)
    answers = [json.loads(line) for line in out.splitlines()]
    assert code == code_json == EXIT_DONE
    assert [answer["prompt"] for answer in answers] == ["What?", "Who?"]
    assert text == "".join(answer["answer"] + "\n" for answer in answers)
    assert all(answer["tokens"] <= 6 and answer["ended"] for answer in answers)
    lines = [
        {"prompt": "Who?", "imu": str(media["imu"])},
        {"prompt": "x", "image": "no.jpg"},
        {"prompt": "What?", "imu": [str(media["imu"])]},
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("\n\n".join(map(json.dumps, lines)))
    code, out, err = run([model_dir, "--jsonl", path, "--json", *short], capsys)
    found = [json.loads(line) for line in out.splitlines()]
    assert code == EXIT_FAILED and "line 3: --image" in err and "no such file" in err
    assert [f.get("answer") for f in found] == [answers[1]["answer"], None, answers[0]["answer"]]
    assert "no such file" in found[1]["error"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "it is empty"),
        ("{", "line 1: "),
        ("[]", "it is not a JSON object"),
        ('{"prompt": 7}', "its prompt is not a text"),
        ('\n{"prompt": "x", "smell": "y"}', "line 2: it has 'smell'"),
        ('{"image": [7]}', "its image is not a path"),
    ],
)
@pytest.mark.seconds
def test_questions_that_cannot_be_read_are_refused(
    text: str, says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(text)
    code, _, err = run(["model", "--jsonl", path], capsys)
    assert code == EXIT_USAGE and says in err
    code, _, err = run(["model", "What?", "--jsonl", path], capsys)
    assert code == EXIT_USAGE and "--jsonl together with a prompt" in err


def test_every_modality_has_a_file_here(media: dict[str, Path]) -> None:
    assert set(media) == set(all_modalities())


@pytest.mark.parametrize("name", list(all_modalities()))
@pytest.mark.seconds
def test_a_file_of_each_modality_changes_what_the_model_reads(
    name: str, loaded: tuple[Any, Any], media: dict[str, Path]
) -> None:
    model, processor = loaded
    values = read_files([(name, media[name])])
    assert {k: tuple(v.shape) for k, v in values.items()} == {
        name: (1, *all_modalities()[name].value_shape)
    }
    answer = g.generate(
        model,
        processor.tokenizer,
        g.build_prompt("What is it?", "auto"),
        values,
        decoding=g.DecodingOptions(max_new_tokens=5),
    )
    assert 1 <= answer.tokens <= 5 and STOP not in answer.text
    ids = g.encode_prompt(processor.tokenizer, "x")
    with torch.inference_mode():
        given = model(ids, **{f"{name}_values": values[name]}).logits[0, -1]
        other = model(ids, **{f"{name}_values": torch.zeros_like(values[name])}).logits[0, -1]
        none = model(ids).logits[0, -1]
    assert not torch.allclose(given, none) and not torch.allclose(given, other)


def test_the_command_takes_files_of_one_modality_where_the_prompt_says(
    model_dir: Path,
    media: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: dict[str, Any] = {}
    real: Any = OneLLMForConditionalGeneration.generate

    def record(self: Any, *given: Any, **options: Any) -> Any:
        seen.update(options)
        return real(self, *given, **options)

    monkeypatch.setattr(OneLLMForConditionalGeneration, "generate", record)
    files = ["--image", media["image"], "--image", media["image"], "--audio", media["audio"]]
    question = "hear <audio>: <image> or <image>?"
    code, _, said = run([model_dir, question, *files, "--max-new-tokens", 3], capsys)
    assert code == EXIT_DONE, said
    ((first, *others),) = seen["media_spans"]
    assert [name for name, _ in (first, *others)] == ["audio", "image", "image"]
    places = [place for _, place in (first, *others)]
    assert 1 < places[0] < places[1] < places[2]
    assert len(seen["image_values"]) == 2 and len(seen["audio_values"]) == 1


@pytest.mark.seconds
def test_the_command_takes_several_files_in_any_order(
    model_dir: Path, media: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["--image", media["image"], "--audio", media["audio"], "--imu", media["imu"]]
    code, first, _ = run([model_dir, "Describe it.", *files, "--max-new-tokens", 12], capsys)
    assert code == EXIT_DONE and first.endswith("\n")
    code, again, _ = run(
        [model_dir, "Describe it.", *reversed_options(files), "--max-new-tokens", 12], capsys
    )
    assert (code, again) == (EXIT_DONE, first), "the order on the command line does not matter"
    code, turned, _ = run(
        [model_dir, "Describe it.", *files, "--order", "imu,audio,image", "--max-new-tokens", 12],
        capsys,
    )
    assert code == EXIT_DONE and turned != first, "--order does"


def reversed_options(files: list[Any]) -> list[Any]:
    pairs = [files[i : i + 2] for i in range(0, len(files), 2)]
    return [item for pair in reversed(pairs) for item in pair]


@pytest.mark.seconds
def test_greedy_is_deterministic_and_sampling_follows_its_seed(
    loaded: tuple[Any, Any], media: dict[str, Path]
) -> None:
    model, processor = loaded
    values = read_files([("image", media["image"])])

    def said(**options: Any) -> str:
        return g.generate(
            model,
            processor.tokenizer,
            "",
            values,
            decoding=g.DecodingOptions(max_new_tokens=20, **options),
        ).text

    assert said() == said(seed=5)
    hot = {"temperature": 5.0, "top_p": 1.0}
    assert said(seed=1, **hot) == said(seed=1, **hot) != said(seed=2, **hot)
    assert said(temperature=5.0, top_p=1e-6, seed=7) == said(), (
        "the smallest nucleus is the greedy token"
    )


def test_the_reference_offset_gives_the_same_first_token_and_another_rest(
    loaded: tuple[Any, Any], media: dict[str, Path]
) -> None:
    model, processor = loaded
    values = read_files([("audio", media["audio"])])
    text = g.build_prompt("What do you hear?", "conversation")
    ids = g.encode_prompt(processor.tokenizer, text)
    new = {
        mode: model.generate(
            ids,
            torch.ones_like(ids),
            audio_values=values["audio"],
            decode_offset=mode,
            max_new_tokens=16,
            do_sample=False,
        )[0, ids.shape[1] :].tolist()
        for mode in g.OFFSETS
    }
    assert new["correct"][0] == new["reference"][0] and new["correct"] != new["reference"]


def test_prompts_are_encoded_as_training_encodes_them(loaded: tuple[Any, Any]) -> None:
    from onellm_dist.data.text import TextEncoder
    from onellm_dist.modalities import Part

    tokenizer = loaded[1].tokenizer
    conversation = (
        b'{"conversations": [{"from": "human", "value": "What is it?"},'
        b' {"from": "gpt", "value": "a cone"}]}'
    )
    trained, labels = TextEncoder(tokenizer, "conversation", 10_000).encode(
        {"json": Part("json", conversation)}
    )
    prompt = g.encode_prompt(tokenizer, g.build_prompt("What is it?", "auto"))[0].tolist()
    answer_at = next(i for i, label in enumerate(labels) if label >= 0)
    assert trained[:answer_at] == prompt, "the prompt is what precedes the first supervised token"
    assert g.encode_prompt(tokenizer, g.build_prompt("", "auto")).tolist() == [
        [tokenizer.bos_token_id]
    ]
    assert g.encode_prompt(tokenizer, g.build_prompt("red", "raw"))[0, 0] == tokenizer.bos_token_id


@pytest.mark.seconds
def test_what_is_refused_before_the_model_is_loaded(
    model_dir: Path,
    media: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "onellm_dist.model.presets.load_model", lambda **_: pytest.fail("the model was loaded")
    )
    corrupt = tmp_path / "broken.jpg"
    corrupt.write_bytes(media["image"].read_bytes()[:200])
    alone = tmp_path / "alone.depth.png"
    alone.write_bytes(media["depth"].read_bytes())
    image = ["--image", media["image"]]
    for arguments, code, words in (
        ([model_dir, "x", "--image", corrupt], EXIT_FAILED, "broken.jpg"),
        ([model_dir, "x", "--audio", media["image"]], EXIT_FAILED, "scene.jpg"),
        ([model_dir, "x", "--depth", alone], EXIT_FAILED, "alone.depth.png"),
        ([model_dir, "x", "--image", tmp_path / "none.jpg"], EXIT_USAGE, "none.jpg"),
        ([tmp_path / "nowhere", "x", *image], EXIT_USAGE, "nowhere"),
        ([model_dir, "<image> x", *image, *image], EXIT_USAGE, "1 <image> for 2 media"),
        ([model_dir, "<audio> x", *image], EXIT_USAGE, "1 <audio> for 0 media"),
        ([model_dir, "x", *image, "--order", "image,audio"], EXIT_USAGE, "--order"),
        ([model_dir, "x", *image, "--format", "essay"], EXIT_USAGE, "--format essay"),
        ([model_dir, "x", *image, "--decode-offset", "wrong"], EXIT_USAGE, "--decode-offset wrong"),
        ([model_dir], EXIT_USAGE, "neither a prompt nor a file"),
        ([model_dir, "x", "--smell", media["image"]], EXIT_USAGE, "smell"),
    ):
        found, out, err = run(arguments, capsys)
        assert found == code and words in err and not out, f"{arguments}: {found} {err}"
        if "smell" not in words:
            assert len(err.strip().splitlines()) >= 3, "what, why, what to do"


def test_a_broken_json_beside_a_file_is_named(media: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "cat.jpg").write_bytes(media["image"].read_bytes())
    (tmp_path / "cat.json").write_text("{")
    with pytest.raises(SampleError, match=r"cat\.json"):
        read_files([("image", tmp_path / "cat.jpg")])


def test_a_prompt_longer_than_the_context_is_refused(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    with pytest.raises(UsageError, match="positions"):
        g.generate(
            model, processor.tokenizer, "x", {}, decoding=g.DecodingOptions(max_new_tokens=2000)
        )


@pytest.mark.seconds
def test_many_questions_get_the_answers_that_the_command_gives(
    model_dir: Path, media: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"image": media["image"], "audio": media["audio"]}
    questions: list[dict[str, Any]] = [
        {"inputs": [], "prompt": "Hello?"},
        {"inputs": [[n, str(f)] for n, f in files.items()], "prompt": "What is it?"},
    ]
    answers = list(ask_questions(model_dir, questions, max_new_tokens=6))
    _, said, _ = run(
        [
            model_dir,
            "What is it?",
            *[x for n, f in files.items() for x in (f"--{n}", f)],
            "--max-new-tokens",
            6,
        ],
        capsys,
    )
    assert len(answers) == 2
    assert answers[1]["text"] == said.strip()
    assert answers[0]["tokens"] <= 6
