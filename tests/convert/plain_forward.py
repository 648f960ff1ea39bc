"""OneLLM's forward for one sample, written from the paper: no packing, no modules, no shared code.

It works on the reference's own checkpoint layout (`llma.*`), so that it checks the conversion too.
It computes in fp32, one sample at a time.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

Weights = dict[str, torch.Tensor]


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, causal: bool = False
) -> torch.Tensor:
    """Dense softmax attention over [L, D]."""
    length, width = q.shape
    q, k, v = (x.reshape(-1, heads, width // heads).transpose(0, 1) for x in (q, k, v))
    scores = q @ k.transpose(1, 2) / math.sqrt(width // heads)
    if causal:
        scores = scores + torch.full((length, length), -math.inf).triu(1)
    return (scores.softmax(-1) @ v).transpose(0, 1).reshape(length, width)


def layer_norm(x: torch.Tensor, w: Weights, key: str) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{key}.weight"], w[f"{key}.bias"], 1e-5)


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-5) * weight


def swiglu(x: torch.Tensor, w: Weights, key: str) -> torch.Tensor:
    up, activated = x @ w[f"{key}.w3.weight"].T, x @ w[f"{key}.w1.weight"].T
    return (activated * torch.sigmoid(activated) * up) @ w[f"{key}.w2.weight"].T


def clip_blocks(x: torch.Tensor, w: Weights, heads: int) -> torch.Tensor:
    """ln_pre, resblocks, ln_post on every token: [L, D]."""
    v = "llma.clip.visual"
    x = layer_norm(x, w, f"{v}.ln_pre")
    for i in range(
        1 + max(int(k.split(".")[5]) for k in w if k.startswith(f"{v}.transformer.resblocks."))
    ):
        b = f"{v}.transformer.resblocks.{i}"
        y = layer_norm(x, w, f"{b}.ln_1")
        q, k, val = (y @ w[f"{b}.attn.in_proj_weight"].T + w[f"{b}.attn.in_proj_bias"]).chunk(3, -1)
        x = (
            x
            + attend(q, k, val, heads) @ w[f"{b}.attn.out_proj.weight"].T
            + w[f"{b}.attn.out_proj.bias"]
        )
        y = layer_norm(x, w, f"{b}.ln_2") @ w[f"{b}.mlp.c_fc.weight"].T + w[f"{b}.mlp.c_fc.bias"]
        x = (
            x
            + (y * torch.sigmoid(1.702 * y)) @ w[f"{b}.mlp.c_proj.weight"].T
            + w[f"{b}.mlp.c_proj.bias"]
        )
    return layer_norm(x, w, f"{v}.ln_post")


def farthest(colours: np.ndarray, count: int) -> list[int]:
    """Farthest-point sampling from index 0 (clouds without ties)."""
    nearest, chosen = np.full(len(colours), 1e10, np.float32), [0]
    while len(chosen) < count:
        nearest = np.minimum(nearest, ((colours - colours[chosen[-1]]) ** 2).sum(1))
        chosen.append(int(nearest.argmax()))
    return chosen


def tokenize(name: str, value: torch.Tensor, w: Weights) -> torch.Tensor:
    """One sample's value to frames of encoder tokens [frames, L, D] (`name` is the reference's)."""
    width = w["llma.clip.visual.class_embedding"].shape[0]
    if name in ("image", "video", "rgbd", "rgbn"):
        frames = (
            value.reshape(-1, 3, 16, 14, 16, 14)
            .permute(0, 2, 4, 1, 3, 5)
            .reshape(-1, 256, 3 * 14 * 14)
        )  # patches, row by row
        return frames @ w["llma.clip.visual.conv1.weight"].reshape(width, -1).T
    if name == "audio":
        patches = value[0].unfold(0, 16, 10).unfold(1, 16, 10).reshape(12 * 101, 256)
        return (
            patches @ w["llma.conv1.audio.weight"].reshape(width, -1).T + w["llma.conv1.audio.bias"]
        )[None]
    if name == "point":
        colours = value[:, 3:6]
        centres = colours[farthest(colours.numpy(), 1024)]
        near = (
            torch.cdist(centres, colours, compute_mode="donot_use_mm_for_euclid_dist")
            .topk(32, largest=False)
            .indices
        )
        features = (
            value[near] @ w["llma.conv1.point.conv1.weight"].reshape(width, 6).T
            + w["llma.conv1.point.conv1.bias"]
        )
        return features.max(1).values[None]
    if name == "imu":
        windows = value.unfold(1, 10, 1).permute(1, 0, 2).reshape(391, 60)
        return (windows @ w["llma.conv1.imu.weight"].reshape(width, 60).T)[None]
    flat = value[0] @ w["llma.conv1.fmri.weight"].T + w["llma.conv1.fmri.bias"]
    return flat.reshape(width, 8).T[None]


def clip_features(name: str, value: torch.Tensor, w: Weights, heads: int) -> torch.Tensor:
    """[L + 1, D]: the mean over frames of CLIP's last layer."""
    own = f"llma.positional_embedding.{name}"
    positions = w[own] if own in w else w["llma.clip.visual.positional_embedding"]
    start = w["llma.clip.visual.class_embedding"][None]
    return torch.stack(
        [
            clip_blocks(torch.cat([start, frame]) + positions, w, heads)
            for frame in tokenize(name, value, w)
        ]
    ).mean(0)


def router_logits(name: str, w: Weights) -> torch.Tensor:
    """[30, E] from the learned tokens alone."""
    r, tokens = f"llma.routers.{name}", w[f"llma.resample_tokens.{name}"][0]
    hidden = tokens @ w[f"{r}.fc1.weight"].T + w[f"{r}.fc1.bias"]
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
    return hidden @ w[f"{r}.fc2.weight"].T + w[f"{r}.fc2.bias"]


def modality_tokens(
    name: str, value: torch.Tensor, w: Weights, encoder_heads: int, upm_heads: int
) -> torch.Tensor:
    """[30, d]: everything before the LLM."""
    p = f"llma.clip_proj1.{name}"
    x = clip_features(name, value, w, encoder_heads)
    x = layer_norm(x @ w[f"{p}.0.weight"].T + w[f"{p}.0.bias"], w, f"{p}.1")
    x = torch.cat([w[f"llma.resample_tokens.{name}"][0], x])
    weights = torch.sigmoid(router_logits(name, w))
    weights = weights / weights.sum(1, keepdim=True)
    out = torch.zeros(30, x.shape[1])
    for expert in range(weights.shape[1]):
        y = x
        for i in range(
            1
            + max(
                int(key.split(".")[3])
                for key in w
                if key.startswith(f"llma.resample_layers.{expert}.")
            )
        ):
            b = f"llma.resample_layers.{expert}.{i}"
            z = rms_norm(y, w[f"{b}.attention_norm.weight"])
            q, k, v = (z @ w[f"{b}.attention.w{c}.weight"].T for c in "qkv")
            mixed = attend(q, k, v, upm_heads)
            y = y + mixed @ w[f"{b}.attention.wo.weight"].T
            y = y + swiglu(rms_norm(y, w[f"{b}.ffn_norm.weight"]), w, f"{b}.feed_forward")
        out = out + weights[:, expert : expert + 1] * y[:30]
    p = f"llma.clip_proj2.{name}"
    return layer_norm(out @ w[f"{p}.0.weight"].T + w[f"{p}.0.bias"], w, f"{p}.1")


def rotate(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Meta's rotary positions: neighbouring channels are one complex number."""
    length, width = x.shape
    head = width // heads
    pairs = torch.view_as_complex(x.reshape(length, heads, head // 2, 2))
    angles = torch.outer(
        torch.arange(length).float(), 10000.0 ** -(torch.arange(0, head, 2).float() / head)
    )
    return torch.view_as_real(
        pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
    ).reshape(length, width)


def llama(x: torch.Tensor, w: Weights, heads: int) -> torch.Tensor:
    """[L, d] embeddings -> [L, V] logits."""
    for i in range(1 + max(int(k.split(".")[2]) for k in w if k.startswith("llma.layers."))):
        b = f"llma.layers.{i}"
        y = rms_norm(x, w[f"{b}.attention_norm.weight"])
        q, k, v = (y @ w[f"{b}.attention.w{c}.weight"].T for c in "qkv")
        x = (
            x
            + attend(rotate(q, heads), rotate(k, heads), v, heads, causal=True)
            @ w[f"{b}.attention.wo.weight"].T
        )
        x = x + swiglu(rms_norm(x, w[f"{b}.ffn_norm.weight"]), w, f"{b}.feed_forward")
    return rms_norm(x, w["llma.norm.weight"]) @ w["llma.output.weight"].T


def llm_input(ids: torch.Tensor, spans: list[tuple[str, torch.Tensor]], w: Weights) -> torch.Tensor:
    """BOS, each span (start tag, 30 tokens, end tag), the rest of the text: [S + 32 n, d]."""
    text = w["llma.tok_embeddings.weight"][ids]
    pieces = [text[:1]]
    for name, tokens in spans:
        pieces += [w[f"llma.start_tag.{name}"][0], tokens, w[f"llma.end_tag.{name}"][0]]
    return torch.cat([*pieces, text[1:]])
