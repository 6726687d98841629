"""model.py: the encoder against plain code, what it must not depend on, its files, and embed() on any recording or nonsense."""
import math

import numpy as np
import pytest
import torch
import wfdb

import model
from conftest import draw_ecg
from model import (BASELINE_PATCHES, COMPRESS_MV, FORMAT, PATCH_S, REGISTERS, ROPE_PERIODS_S, SIZES, Attention, Encoder,
                   build_encoder, load_encoder, rope_table, rotate, save_encoder, untrained_like)
from prepare import FS, LEADS, lead_id

TWELVE = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")
P = round(PATCH_S * FS)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lively(width=32, depth=2, heads=2):
    """A small encoder with all parameters moved far from their start, where biases and the mask token are 0 and scales all alike."""
    encoder = Encoder(width=width, depth=depth, heads=heads, layer_scale=0.8)
    for i, p in enumerate(encoder.parameters()):
        p.data.add_(0.1 * randn(*p.shape, seed=i))
    return encoder.eval()


@pytest.fixture(scope="module")
def encoder():
    return lively()


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def ids(*names):
    return torch.tensor([lead_id(name) for name in names])


def assert_close(a, b, atol=2e-5):
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=0, atol=atol, equal_nan=True)


# ---------------------------------------------------------------------------------------------------------------------
# the same in plain code, float64

def plain_rotate(vector, time_s):
    """Turn the pairs (2i, 2i + 1) by 2 pi time / period_i; periods geometric between the two of ROPE_PERIODS_S."""
    pairs = len(vector) // 2
    turned = vector.clone()
    for i in range(pairs):
        period = ROPE_PERIODS_S[0] * (ROPE_PERIODS_S[1] / ROPE_PERIODS_S[0]) ** (i / (pairs - 1))
        c, s = math.cos(2 * math.pi * time_s / period), math.sin(2 * math.pi * time_s / period)
        x, y = vector[2 * i], vector[2 * i + 1]
        turned[2 * i], turned[2 * i + 1] = c * x - s * y, s * x + c * y
    return turned


def plain_attention(p, x, times_s, heads):
    """Softmax attention of tokens x (M, D), head by head and row by row; times_s: None for a token without a place in time."""
    E = x.shape[1] // heads
    q, k, v = (x @ p["qkv.weight"].T).split(x.shape[1], dim=1)
    out = torch.zeros_like(x)
    for h in range(heads):
        part = slice(h * E, (h + 1) * E)
        turned = [[row if t is None else plain_rotate(row, t) for row, t in zip(m[:, part], times_s)] for m in (q, k)]
        for i, query in enumerate(turned[0]):
            weights = torch.stack([torch.exp(query @ key / math.sqrt(E)) for key in turned[1]])
            out[i, part] = sum(w * value for w, value in zip(weights / weights.sum(), v[:, part]))
    return out @ p["proj.weight"].T + p["proj.bias"]


def plain_norm(x, weight, bias):
    return (x - x.mean(1, keepdim=True)) / torch.sqrt(x.var(1, keepdim=True, correction=0) + 1e-5) * weight + bias


def below(p, prefix):
    return {name.removeprefix(prefix): value for name, value in p.items() if name.startswith(prefix)}


def plain_front_end(lead):
    """Patches (N, P) of one lead (T,): asinh of what is above the baseline, a line through means over BASELINE_PATCHES."""
    means = lead.view(-1, P).mean(dim=1)
    half = BASELINE_PATCHES // 2
    baseline = [means[max(0, n - half):n + half + 1].mean() for n in range(len(means))]
    out = torch.empty_like(lead)
    for i in range(len(lead)):
        place = min(max((i + 0.5) / P - 0.5, 0), len(means) - 1)        # in patches, from the centre of the first
        left, right = baseline[math.floor(place)], baseline[math.ceil(place)]
        out[i] = torch.asinh((lead[i] - left - (place % 1) * (right - left)) / COMPRESS_MV)
    return out.view(-1, P)


def plain_encoder(encoder, signal, leads):
    """All tokens (M, D) after the last norm, of one recording: signal (L, T) mV, leads (L,)."""
    p = {name: value.double() for name, value in encoder.state_dict().items()}
    tokens, times_s = [p["cls_token"][0, 0], *p["register_tokens"][0]], [None] * (1 + encoder.num_registers)
    for lead, i in zip(signal.double(), leads):
        for n, patch in enumerate(plain_front_end(lead)):
            tokens.append(p["patch_embedding.weight"] @ patch + p["patch_embedding.bias"] + p["lead_embedding.weight"][i])
            times_s.append((n + 0.5) * P / FS)
    x = torch.stack(tokens)
    for d in range(encoder.config["depth"]):
        b = below(p, f"blocks.{d}.")
        h = plain_norm(x, b["norm1.weight"], b["norm1.bias"])
        x = x + b["scale1"] * plain_attention(below(b, "attention."), h, times_s, encoder.config["heads"])
        h = plain_norm(x, b["norm2.weight"], b["norm2.bias"]) @ b["mlp.0.weight"].T + b["mlp.0.bias"]
        h = h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
        x = x + b["scale2"] * (h @ b["mlp.2.weight"].T + b["mlp.2.bias"])
    return plain_norm(x, p["norm.weight"], p["norm.bias"])


def test_encoder_equals_plain_code(encoder):
    signal, leads = 0.3 * randn(2, 3, 9 * P), torch.stack([ids("I", "V2", "ECG"), ids("V5", "aVR", "II")])
    signal += torch.linspace(0, 2, 9 * P) ** 2                          # wander
    out = encoder(signal, leads)
    for b in range(2):
        expected = plain_encoder(encoder, signal[b], leads[b]).float()
        assert expected.std(dim=0).min() > 0.1                          # tokens differ: nothing is equal for being zero
        assert_close(out.cls[b], expected[0])
        assert_close(out.registers[b], expected[1:1 + REGISTERS])
        assert_close(out.patches[b], expected[1 + REGISTERS:].view(3, 9, -1))


def test_attention_equals_plain_code():
    attention = Attention(24, 3)
    for i, p in enumerate(attention.parameters()):
        p.data.copy_(0.4 * randn(*p.shape, seed=i))
    x, times_s = randn(1, 7, 24), torch.tensor([0.1, 0.3, 5.0, 0.3, 31.4, 2.0, 9.9])
    expected = plain_attention({k: v.double() for k, v in attention.state_dict().items()}, x[0].double(), times_s.tolist(), 3)
    assert_close(attention(x[0], [(1, 7)], [rope_table(times_s, 8)]), expected.float(), atol=1e-4)             # fp32 angles of 500 radians


# ---------------------------------------------------------------------------------------------------------------------
# time

def test_rope_scores_depend_on_the_time_difference_only():
    q, k = randn(1, 1, 1, 16), randn(1, 1, 1, 16, seed=1)

    def score(t_q, t_k):
        turned = [rotate(x, rope_table(torch.tensor([t]), 16)) for x, t in ((q, t_q), (k, t_k))]
        return (turned[0] * turned[1]).sum()
    for shift in (0.2, 7.3, 100.0):
        assert_close(score(1.1 + shift, 0.3 + shift), score(1.1, 0.3), atol=1e-3)
    assert abs(score(1.1, 0.3) - score(1.3, 0.3)) > 0.1
    assert abs(score(1.1, 0.3) - score(0.3, 1.1)) > 0.1                 # before is not after


def test_rope_periods():
    shortest, longest = ROPE_PERIODS_S
    table = rope_table(torch.tensor([0.0, shortest, longest, longest / 2]), 8)
    assert table.shape == (4, 4)
    assert_close(table[0], torch.ones(4, dtype=table.dtype))
    assert_close(table[1, 0].real, torch.tensor(1.0), atol=1e-4)
    assert_close(table[2, -1].real, torch.tensor(1.0), atol=1e-4)
    assert_close(table[3, -1].real, torch.tensor(-1.0), atol=1e-4)


def test_rope_tables_are_fp32():
    times_s = torch.arange(64) * 0.2 + 0.1
    assert rope_table(times_s, 16).dtype == torch.complex64
    x = randn(1, 2, 64, 16).bfloat16()
    turned = rotate(x, rope_table(times_s, 16))
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, rotate(x.float(), rope_table(times_s, 16)).bfloat16())


# ---------------------------------------------------------------------------------------------------------------------
# what features depend on, and what not

def test_shapes(encoder):
    out = encoder(randn(2, 3, 5 * P), ids("I", "II", "V1").expand(2, -1))
    assert out.cls.shape == (2, 32) and out.registers.shape == (2, REGISTERS, 32) and out.patches.shape == (2, 3, 5, 32)
    for signal, leads in ((randn(1, 1, P + 1), ids("I")[None]), (randn(1, 2, P), ids("I")[None]), (randn(1, 1, 0), ids("I")[None])):
        with pytest.raises(ValueError, match="multiple of 50.*embed"):
            encoder(signal, leads)


def test_lead_order_does_not_matter(encoder):
    signal, leads = 0.3 * randn(2, 5, 4 * P), ids("I", "V1", "V3", "Z", "ECG").expand(2, -1)
    order = torch.tensor([3, 0, 4, 1, 2])
    out, permuted = encoder(signal, leads), encoder(signal[:, order], leads[:, order])
    assert_close(permuted.cls, out.cls)
    assert_close(permuted.patches, out.patches[:, order])


def test_lead_names_matter(encoder):
    signal = 0.3 * randn(1, 1, 4 * P)
    assert (encoder(signal, ids("II")[None]).cls - encoder(signal, ids("unknown")[None]).cls).abs().max() > 0.01


def test_dc_offset_does_not_matter(encoder):
    signal, leads = 0.3 * randn(2, 3, 4 * P), ids("I", "V1", "V3").expand(2, -1)
    offset = torch.tensor([5.0, -3.0, 0.7])[:, None]
    for a, b in zip(encoder(signal + offset, leads), encoder(signal, leads)):
        assert_close(a, b, atol=1e-4)


def test_amplitude_matters(encoder):
    signal, leads = 0.3 * randn(1, 1, 4 * P), ids("I")[None]
    assert (encoder(2 * signal, leads).cls - encoder(signal, leads).cls).abs().max() > 0.05


def test_masked_patches_are_hidden_altogether(encoder):
    """Not even their mean may show: it would reach the other patches through the baseline."""
    signal, leads = 0.3 * randn(2, 3, 6 * P), ids("I", "V1", "V3").expand(2, -1)
    mask = randn(2, 3, 6, seed=1) > 0.3
    mask[0, 1] = True                                                   # a whole lead
    other = torch.where(mask.repeat_interleave(P, dim=2), 2 + randn(2, 3, 6 * P, seed=2), signal)
    assert 0 < mask.float().mean() < 1
    for a, b in zip(encoder(signal, leads, mask=mask), encoder(other, leads, mask=mask)):
        assert_close(a, b)


def test_mask_token_stands_in_for_masked_patches(encoder):
    signal, leads, mask = 0.3 * randn(1, 2, 4 * P), ids("I", "V1")[None], torch.zeros(1, 2, 4, dtype=torch.bool)
    clear = encoder(signal, leads)
    for a, b in zip(encoder(signal, leads, mask=mask), clear):
        assert_close(a, b)
    mask[0, 1, 2] = True
    tokens, masked = encoder.tokens(signal), encoder.tokens(signal, mask)
    assert torch.equal(masked[0, 1, 2], encoder.mask_token)
    assert_close(masked[0, 0], tokens[0, 0])                            # no masked patch in that lead
    assert (encoder(signal, leads, mask=mask).cls - clear.cls).abs().max() > 0.01


def test_dropped_leads_are_as_if_not_given(encoder):
    signal, leads = 0.3 * randn(2, 4, 3 * P), ids("I", "V1", "V3", "II").expand(2, -1)
    keep = torch.tensor([True, False, True, False])
    out, subset = encoder(signal, leads, keep=keep[:, None].expand(-1, 3)), encoder(signal[:, keep], leads[:, keep])
    assert_close(out.cls, subset.cls)
    assert_close(out.registers, subset.registers)
    assert_close(out.patches[:, keep], subset.patches)
    assert out.patches[:, ~keep].isnan().all()


def test_dropped_patches_have_no_token(encoder):
    """Patches of zero mean have a zero baseline, so that only the tokens that there are can matter."""
    signal, leads = 0.3 * randn(2, 2, 6 * P), ids("I", "V1").expand(2, -1)
    signal -= signal.unflatten(-1, (6, P)).mean(-1).repeat_interleave(P, dim=-1)
    out = encoder(signal, leads, keep=(torch.arange(6) < 4).expand(2, -1))
    short = encoder(signal[..., :4 * P], leads)
    assert_close(out.cls, short.cls)
    assert_close(out.patches[:, :, :4], short.patches)
    assert out.patches[:, :, 4:].isnan().all()
    late = encoder(signal, leads, keep=(torch.arange(6) >= 2).expand(2, -1))
    assert (late.cls - encoder(signal[..., 2 * P:], leads).cls).abs().max() > 1e-3     # later in time is not the same


def test_dropped_patches_are_hidden_altogether(encoder):
    signal, leads = 0.3 * randn(2, 3, 6 * P), ids("I", "V1", "V3").expand(2, -1)
    keep = randn(3, 6, seed=1) > 0
    other = torch.where(keep.repeat_interleave(P, dim=1), signal, 2 + randn(2, 3, 6 * P, seed=2))
    for a, b in zip(encoder(signal, leads, keep=keep), encoder(other, leads, keep=keep)):
        assert_close(a, b)
    mask = (randn(2, 3, 6, seed=3) > 0.5) & keep                        # and with a mask beside it
    other = torch.where((mask | ~keep).repeat_interleave(P, dim=2), 2 + randn(2, 3, 6 * P, seed=2), signal)
    for a, b in zip(encoder(signal, leads, mask, keep), encoder(other, leads, mask, keep)):
        assert_close(a, b)


# ---------------------------------------------------------------------------------------------------------------------
# initial weights and files

def test_weights_depend_on_the_seed_alone():
    torch.manual_seed(1)
    first = build_encoder("tiny", seed=3).state_dict()
    torch.manual_seed(2)
    torch.use_deterministic_algorithms(True)                            # fills what is not initialised with NaN
    try:
        second = build_encoder("tiny", seed=3).state_dict()
    finally:
        torch.use_deterministic_algorithms(False)
    other = build_encoder("tiny", seed=4).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["blocks.0.attention.qkv.weight"], other["blocks.0.attention.qkv.weight"])


def test_initial_statistics():
    encoder = build_encoder("tiny")
    signal = torch.tensor(draw_ecg(FS, 10, TWELVE)[None]).float()
    assert 0.3 < encoder.tokens(signal).std() < 3                       # about 1: lead vectors (0.5) are seen and do not drown it
    for linear in (encoder.patch_embedding, encoder.blocks[0].attention.qkv, encoder.blocks[0].mlp[2]):
        std = linear.in_features ** -0.5
        assert linear.weight.std().item() == pytest.approx(0.88 * std, rel=0.03) and linear.weight.abs().max() <= 2 * std   # cut at 2 deviations
    assert encoder.lead_embedding.weight.shape == (len(LEADS), encoder.width)
    assert encoder.lead_embedding.weight.std().item() == pytest.approx(0.5, rel=0.1)
    assert encoder.blocks[0].scale1.unique().tolist() == [SIZES["tiny"]["layer_scale"]]


def test_untrained_like_has_the_first_weights():
    encoder = build_encoder("tiny", seed=5)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    for p in encoder.parameters():
        p.data.add_(1.0)
    untrained = untrained_like(encoder)
    assert not untrained.training and untrained.config == encoder.config
    assert all(torch.equal(value, before[name]) for name, value in untrained.state_dict().items())


@pytest.fixture(scope="module")
def saved(encoder, tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder") / "encoder.pt"
    save_encoder(encoder, path, step=7)
    return path


def test_file_gives_the_same_encoder(encoder, saved):
    loaded = load_encoder(saved)
    assert not loaded.training and loaded.config == encoder.config
    assert loaded.state_dict().keys() == encoder.state_dict().keys()
    assert all(torch.equal(value, encoder.state_dict()[name]) for name, value in loaded.state_dict().items())
    signal, leads = randn(1, 2, 4 * P), ids("I", "V1")[None]
    assert all(torch.equal(a, b) for a, b in zip(loaded(signal, leads), encoder(signal, leads)))


def test_file_describes_itself(saved):
    content = torch.load(saved, weights_only=True)
    assert content["format"] == FORMAT and content["about"] == {"step": 7}
    stated = dict(fs_hz=250, units="mV", leads=list(LEADS), baseline_patches=BASELINE_PATCHES, compress_mv=COMPRESS_MV)
    assert content["preprocessing"] == stated and content["config"]["patch_samples"] == P


def test_other_weights_can_be_saved(encoder, tmp_path):
    shifted = {name: value + 1 for name, value in encoder.state_dict().items()}
    save_encoder(encoder, tmp_path / "encoder.pt", shifted)
    assert torch.equal(load_encoder(tmp_path / "encoder.pt").cls_token, encoder.cls_token + 1)


@pytest.mark.parametrize("change", ["absent", "foreign"])
def test_weights_must_fit_exactly(saved, tmp_path, change):
    content = torch.load(saved, weights_only=True)
    content["state_dict"].update({"foreign.weight": torch.ones(1)})
    if change == "absent":
        del content["state_dict"]["foreign.weight"], content["state_dict"]["mask_token"]
    torch.save(content, tmp_path / "encoder.pt")
    with pytest.raises((ValueError, RuntimeError), match="foreign.weight" if change == "foreign" else "mask_token"):
        load_encoder(tmp_path / "encoder.pt")


def write_bad_file(path, kind, saved):
    content = torch.load(saved, weights_only=True)
    if kind == "text":
        path.write_text("not an encoder")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated":
        path.write_bytes(saved.read_bytes()[:2000])
    elif kind == "foreign":
        torch.save({"model": torch.ones(3)}, path)
    elif kind == "a tensor":
        torch.save(torch.ones(3), path)
    elif kind == "code inside":
        torch.save({"format": FORMAT, "config": ValueError}, path)
    elif kind == "other format":
        torch.save(content | {"format": "ecg-dino encoder 99"}, path)
    elif kind == "other rate":
        torch.save(content | {"preprocessing": content["preprocessing"] | {"fs_hz": 500}}, path)
    elif kind == "other leads":
        torch.save(content | {"preprocessing": content["preprocessing"] | {"leads": ["I"]}}, path)
    elif kind == "unknown compression":
        content["preprocessing"].pop("compress_mv")
        torch.save(content, path)
    elif kind == "no preprocessing":
        torch.save({name: value for name, value in content.items() if name != "preprocessing"}, path)
    elif kind == "other baseline":
        torch.save(content | {"preprocessing": content["preprocessing"] | {"baseline_patches": BASELINE_PATCHES + 2}}, path)
    elif kind == "other compression":
        torch.save(content | {"preprocessing": content["preprocessing"] | {"compress_mv": 2 * COMPRESS_MV}}, path)


@pytest.mark.parametrize("kind, text", [
    ("text", "not an encoder.*train.py"), ("empty", "not an encoder.*train.py"), ("truncated", "not an encoder.*train.py"),
    ("foreign", "not an encoder.*train.py"), ("a tensor", "not an encoder.*train.py"), ("code inside", "not an encoder.*train.py"),
    ("other format", "expected format 'ecg-dino encoder 3'.*ecg-dino encoder 99"),
    ("other rate", "500 Hz.*250 Hz"), ("other leads", "1 leads.*21"),
    ("other baseline", "the commit that wrote it"), ("other compression", "the commit that wrote it"),
    ("unknown compression", "the commit that wrote it"), ("no preprocessing", "encoder.pt that train.py wrote"),
    ("absent", "no encoder at .*train.py writes.*random:tiny")])
def test_bad_files_are_refused(saved, tmp_path, kind, text):
    write_bad_file(tmp_path / "encoder.pt", kind, saved)
    with pytest.raises(ValueError, match=text):
        load_encoder(tmp_path / "encoder.pt")


def test_untrained_encoders_by_name():
    assert torch.equal(load_encoder("random:tiny").cls_token, build_encoder("tiny", 0).cls_token)
    assert torch.equal(load_encoder("random:tiny:9").cls_token, build_encoder("tiny", 9).cls_token)


@pytest.mark.parametrize("name", ["random:colossal", "random:", "random:tiny:first"])
def test_unknown_names_are_refused(name):
    with pytest.raises(ValueError, match="tiny, small, base, large|random:SIZE:SEED"):
        load_encoder(name)


# ---------------------------------------------------------------------------------------------------------------------
# any recording

@pytest.mark.parametrize("leads, fs, seconds", [
    (TWELVE, 500, 10), (TWELVE, 100, 10), (("MLII", "V1"), 360, 65), (("II",), 128, 30), (("ECG",), 1000, 10.1),
    (("ECG", "V1", "other"), 257.5, 12), (("ECG",), 300, 1800), (("MLII", "V1"), 360, 1800), (("I",), 1000, 1800), (("I",), 250, 0.2)])
def test_embed_any_recording(encoder, leads, fs, seconds):
    out = encoder.embed(draw_ecg(fs, seconds, leads), fs=fs, leads=leads)
    N = int(seconds / PATCH_S + 1e-9)
    assert out.global_feature.shape == (32,) and out.local_features.shape == (len(leads), N, 32)
    assert out.global_feature.dtype == out.local_features.dtype == np.float32
    assert np.isfinite(out.global_feature).all() and np.isfinite(out.local_features).all()
    np.testing.assert_allclose(out.times_s, 0.1 + 0.2 * np.arange(N), atol=1e-9)


@pytest.mark.parametrize("fs", [100, 128, 333, 360, 500, 1000])
def test_sampling_rate_hardly_matters(encoder, fs):
    a, b = (encoder.embed(draw_ecg(rate, 20, ("I", "V2")), fs=rate, leads=("I", "V2")) for rate in (fs, 250))
    spread = b.local_features.std(axis=(0, 1)).mean()
    # At either end the resampler knows only one side of the signal.
    assert np.abs(a.local_features - b.local_features)[:, 2:-2].max() < 0.15 * spread
    assert np.abs(a.global_feature - b.global_feature).max() < 0.05 * spread


def test_embed_of_one_window_is_the_encoder_itself(encoder):
    signal = draw_ecg(250, 8, ("I", "V2"))
    out, direct = encoder.embed(signal, fs=250, leads=("I", "V2")), encoder(torch.tensor(signal[None]).float(), ids("I", "V2")[None])
    assert_close(out.global_feature, direct.cls[0], atol=1e-6)
    assert_close(out.local_features, direct.patches[0], atol=1e-6)


def test_layout_and_containers_do_not_matter(encoder):
    signal = draw_ecg(250, 8, ("I", "V2")).astype(np.float32)
    expected = encoder.embed(signal, fs=250, leads=("I", "V2"))
    for same in (signal.T, signal.tolist(), torch.from_numpy(signal), np.asfortranarray(signal)):
        out = encoder.embed(same, fs=250, leads=["I", "V2"])
        assert np.array_equal(out.global_feature, expected.global_feature)
        assert np.array_equal(out.local_features, expected.local_features)
    single = encoder.embed(signal[:1], fs=250, leads=["I"])
    assert np.array_equal(encoder.embed(signal[0], fs=250, leads="I").local_features, single.local_features)


@pytest.mark.parametrize("units, scale", [("uV", 1e3), ("V", 1e-3), ("mv", 1.0)])
def test_units(encoder, units, scale):
    signal = draw_ecg(250, 8)
    out, expected = encoder.embed(scale * signal, fs=250, leads=["II"], units=units), encoder.embed(signal, fs=250, leads=["II"])
    assert_close(out.local_features, expected.local_features, atol=1e-4)


def test_lead_aliases(encoder):
    signal = draw_ecg(250, 8, ("II", "V1"))
    a, b = (encoder.embed(signal, fs=250, leads=leads) for leads in (("MLII", "v1"), ("II", "V1")))
    assert np.array_equal(a.local_features, b.local_features)


def test_a_beat_lies_in_the_patch_of_its_time():
    """Without attention a patch knows only its own samples: where a spike at r seconds shows, there the beat is."""
    encoder = lively(depth=0)
    for fs in (250, 360, 1000):
        for r in (0.41, 3.07, 11.99, 25.3):
            signal = 0.05 * np.sin(2 * np.pi * 7 * np.arange(30 * fs) / fs)
            spiked = signal.copy()
            spiked[round(r * fs)] += 5
            a, b = (encoder.embed(x, fs=fs, leads=["II"]).local_features[0] for x in (signal, spiked))
            assert np.abs(a - b).sum(axis=1).argmax() == int(r * 250 / 50), (fs, r)


@pytest.mark.parametrize("at_once", [3200, 450])
def test_patches_come_from_the_most_central_window(encoder, monkeypatch, at_once):
    monkeypatch.setattr(model, "MAX_EMBED_TOKENS", at_once)
    signal = draw_ecg(250, 27.5, ("II", "V1")).astype(np.float32)            # 137 patches and a rest that is left out
    out = encoder.embed(signal, fs=250, leads=("II", "V1"), window_s=10, stride_s=4)
    starts = [0, 20, 40, 60, 80, 87]                                    # the last window ends with the recording
    windows = [encoder(torch.from_numpy(signal[None, :, s * P:(s + 50) * P]), ids("II", "V1")[None]) for s in starts]
    assert_close(out.global_feature, torch.cat([w.cls for w in windows]).mean(0))
    for n in range(137):
        off_centre = [abs(n + 0.5 - (s + 25)) if s <= n < s + 50 else np.inf for s in starts]
        nearest = [windows[i].patches[0, :, n - s] for i, s in enumerate(starts) if off_centre[i] == min(off_centre)]
        assert min(np.abs(out.local_features[:, n] - features.numpy()).max() for features in nearest) < 2e-5, n
    whole = encoder.embed(signal, fs=250, leads=("II", "V1"), window_s=60, stride_s=60)
    assert np.abs(whole.local_features - out.local_features).max() > 0.01         # windows do differ


def test_windows_are_as_long_as_in_training():
    encoder = Encoder(width=32, depth=1, heads=2, layer_scale=1.0, window_patches={1: 20}).eval()
    signal = draw_ecg(250, 13, ("II", "V1"))
    a, b = (encoder.embed(signal, fs=250, leads=("II", "V1"), **windows) for windows in ({}, dict(window_s=4, stride_s=2)))
    assert np.array_equal(a.local_features, b.local_features) and np.array_equal(a.global_feature, b.global_feature)
    assert np.abs(a.global_feature - encoder.embed(signal, fs=250, leads=("II", "V1"), window_s=13).global_feature).max() > 1e-3


@pytest.mark.parametrize("samples, starts", [(65 * P, (0, 10, 20, 30, 40, 45)), (20 * P, (0,)), (12 * P, (0,))])
def test_pool_is_the_mean_over_windows(samples, starts):
    """[CLS, mean patch], mean over the windows that embed() would take."""
    encoder = Encoder(width=32, depth=1, heads=2, layer_scale=1.0, window_patches={1: 20}).eval()
    signal, leads = 0.3 * randn(3, 2, samples), ids("I", "V1").expand(3, -1)
    n = min(20, samples // P)
    windows = [encoder(signal[..., s * P:(s + n) * P], leads) for s in starts]
    expected = sum(torch.cat((w.cls, w.patches.mean(dim=(1, 2))), dim=1) for w in windows) / len(windows)
    assert_close(encoder.pool(signal, leads), expected)


# ---------------------------------------------------------------------------------------------------------------------
# missing samples

def test_absent_leads_are_as_if_not_given(encoder):
    signal, some = draw_ecg(250, 24, TWELVE), [1, 6, 7]
    absent = np.full_like(signal, np.nan)
    absent[some] = signal[some]
    absent[3] = 0.0                                                     # an unconnected lead is no lead either
    out = encoder.embed(absent, fs=250, leads=TWELVE)
    subset = encoder.embed(signal[some], fs=250, leads=[TWELVE[i] for i in some])
    assert_close(out.global_feature, subset.global_feature)
    assert_close(out.local_features[some], subset.local_features)
    assert np.isnan(np.delete(out.local_features, some, axis=0)).all()


@pytest.mark.parametrize("fs", [250, 360])
def test_patches_with_gaps_are_nan_and_no_others(encoder, fs):
    signal = draw_ecg(fs, 30, ("II", "V1"))
    signal[0, round(3.25 * fs):round(4.05 * fs)] = np.nan               # patches 16 to 20
    signal[1, round(12.5 * fs)] = np.inf                                # patch 62
    signal[0, round(20.1 * fs)] = 500.0                                 # patch 100: no electrode gives half a volt
    out = encoder.embed(signal, fs=fs, leads=("II", "V1"))
    holes = np.isnan(out.local_features)
    assert (holes.all(axis=2) == holes.any(axis=2)).all()
    assert np.flatnonzero(holes[0, :, 0]).tolist() == [16, 17, 18, 19, 20, 100]
    assert np.flatnonzero(holes[1, :, 0]).tolist() == [62]
    assert np.isfinite(out.global_feature).all()


def test_the_rest_of_a_patch_with_a_gap_has_no_influence(encoder):
    signal = draw_ecg(250, 8)
    signal[0, 10 * P + 3] = np.nan
    other = signal.copy()
    other[0, 10 * P + 4:11 * P] += 3
    a, b = (encoder.embed(x, fs=250, leads=["II"]) for x in (signal, other))
    assert_close(a.local_features, b.local_features)
    assert_close(a.global_feature, b.global_feature)


def test_dc_offset_does_not_matter_beside_a_gap(encoder):
    signal = draw_ecg(250, 8)
    signal[0, 10 * P + 3] = np.nan
    a, b = (encoder.embed(x, fs=250, leads=["II"]) for x in (signal, signal + 3))
    assert_close(a.local_features, b.local_features, atol=1e-4)


def test_windows_are_as_long_as_in_training_with_as_many_leads(encoder):
    assert [encoder.window_and_stride(n) for n in (12, 8, 7, 2, 1)] == [(15, 7), (15, 7), (40, 20), (40, 20), (40, 20)]
    signal, leads = draw_ecg(250, 8, TWELVE), list(TWELVE)
    for n, window_s in ((12, 3), (2, 8)):
        assert_close(encoder.embed(signal[:n], fs=250, leads=leads[:n]).global_feature,
                     encoder.embed(signal[:n], fs=250, leads=leads[:n], window_s=window_s).global_feature)


def test_windows_without_signal_do_not_count(encoder):
    signal = draw_ecg(250, 60)
    signal[0, 10 * 250:50 * 250] = np.nan
    out = encoder.embed(signal, fs=250, leads=["II"], window_s=10, stride_s=10)
    ends = [encoder.embed(part, fs=250, leads=["II"], window_s=10) for part in (signal[:, :2500], signal[:, -2500:])]
    assert_close(out.global_feature, (ends[0].global_feature + ends[1].global_feature) / 2)
    assert_close(out.local_features[:, :50], ends[0].local_features)
    assert np.isnan(out.local_features[:, 50:250]).all()


# ---------------------------------------------------------------------------------------------------------------------
# nonsense

GOOD = draw_ecg(250, 10, rr_s=1.5)
NONSENSE = {                     # name: (signal, arguments that differ from a good call, what the message must say)
    "empty": ([], {}, "expected at least one lead and one sample"),
    "no leads": (GOOD, dict(leads=[]), "one name per lead"),
    "0.1 s": (GOOD[:, :25], {}, "at least one patch of 0.2 s"),
    "three dimensions": (GOOD[None], {}, r"expected \(leads, samples\)"),
    "a number": (1.0, {}, r"expected \(leads, samples\)"),
    "None": (None, {}, r"expected \(leads, samples\)"),
    "text": ("ecg.csv", {}, "expected"),
    "texts": ([["a", "b", "c"]], {}, "expected"),
    "ragged": ([[1.0, 2.0], [1.0]], dict(leads=["I", "II"]), "expected"),
    "too many leads": (GOOD, dict(leads=["I", "II"]), "one name per lead"),
    "leads is None": (GOOD, dict(leads=None), "expected"),
    "leads is a count": (GOOD, dict(leads=1), "expected"),
    "fs 0": (GOOD, dict(fs=0), "expected the sampling rate in Hz"),
    "fs negative": (GOOD, dict(fs=-250), "expected the sampling rate in Hz"),
    "fs in kHz": (GOOD, dict(fs=0.25), "expected the sampling rate in Hz"),
    "fs NaN": (GOOD, dict(fs=float("nan")), "expected the sampling rate in Hz"),
    "fs text": (GOOD, dict(fs="250"), "expected the sampling rate in Hz"),
    "all NaN": (GOOD * np.nan, {}, "check the units"),
    "all zero": (GOOD * 0, {}, "check the units"),
    "a gap in every patch": (np.where(np.arange(2500) % 50, GOOD, np.nan), {}, "missing samples"),
    "unknown units": (GOOD, dict(units="inch"), "expected mV, uV or V"),
    "no units": (GOOD, dict(units=None), "expected mV, uV or V"),
    "uV said to be mV": (1000 * GOOD, {}, "units"),
    "mV said to be V": (GOOD, dict(units="V"), "units"),
    "mV said to be uV": (GOOD, dict(units="uV"), "units"),
    "adu said to be mV": (np.round(200 * GOOD) + 1024, {}, "units"),
    "stride beyond window": (GOOD, dict(stride_s=20), "longer than window_s"),
    "window 0": (GOOD, dict(window_s=0), "window_s"),
    "window NaN": (GOOD, dict(window_s=float("nan")), "window_s"),
}


@pytest.mark.parametrize("case", NONSENSE)
def test_nonsense_is_refused_with_a_reason(encoder, case):
    signal, arguments, text = NONSENSE[case]
    with pytest.raises(ValueError, match=text):
        encoder.embed(signal, **(dict(fs=250, leads=["II"]) | arguments))


@pytest.mark.parametrize("scale", [0.02, 8.0])
def test_low_and_high_voltages_are_no_nonsense(encoder, scale):
    assert np.isfinite(encoder.embed(scale * GOOD, fs=250, leads=["II"]).local_features).all()


def test_impossible_widths_are_refused():
    for width, heads in ((30, 4), (9, 1), (4, 2)):                      # the last: one pair of a head has no range of periods
        with pytest.raises(ValueError, match="width"):
            Encoder(width=width, depth=1, heads=heads, layer_scale=1.0)


# ---------------------------------------------------------------------------------------------------------------------
# real recordings

def test_real_recordings(encoder, shared_data):
    """MIT-BIH 114 (leads in the other order) for 30 min, and a PTB-XL record at both of its rates."""
    record = wfdb.rdrecord(str(shared_data / "mitdb" / "114"))
    out = encoder.embed(record.p_signal, fs=record.fs, leads=record.sig_name)
    assert record.sig_name == ["V5", "MLII"] and out.local_features.shape == (2, 9027, 32)
    assert np.isfinite(out.global_feature).all()
    path = next((shared_data / "ptbxl" / "records500").rglob("*.hea"))
    fast, slow = (wfdb.rdrecord(str(p.with_suffix(""))) for p in (path, path.parents[2] / "records100" / path.parent.name
                                                                  / path.name.replace("_hr", "_lr")))
    a, b = (encoder.embed(r.p_signal, fs=r.fs, leads=r.sig_name) for r in (fast, slow))
    assert a.local_features.shape == b.local_features.shape == (12, 50, 32)
    spread = a.local_features.std(axis=(0, 1)).mean()
    assert np.median(np.abs(a.local_features - b.local_features)) < 0.1 * spread
