"""Export of runs: other libraries compute the same outputs, and unsupported parts are reported."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import real_timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from unmask.batch import DTYPES, ImageSpec
from unmask.config import Config, parse_method
from unmask.console import Console
from unmask.engine import checkpoint
from unmask.engine.load import load, read_config
from unmask.errors import UserError
from unmask.interop import check_export
from unmask.interop import names as tensor_names
from unmask.interop.export_common import silence_libraries
from unmask.interop.export_run import export_run
from unmask.interop.export_target import ExportError, ExportFailed
from unmask.interop.find_target import find_target
from unmask.interop.import_weights import import_weights
from unmask.interop.imported_run import plan_of
from unmask.interop.safetensors_file import open_safetensors
from unmask.nn.masks import Mask
from unmask.run import Run

WITH_TIMM = "timm" in sys.modules  # the plugin real_timm imports timm
ENCODER = {"width": 32, "depth": 2, "heads": 2, "patch": (4, 4)}
DECODER = {"width": 16, "depth": 1, "heads": 2}
BEIT = {**ENCODER, "positions": "absent", "relative_bias": True, "layer_scale": 0.1}
TOKENIZER = {"codes": 16, "width": 8, "patch": (4, 4)}
GPT = {"width": 32, "depth": 2, "heads": 2, "colours": 8}
METHODS = {
    "mae": {"name": "mae", "encoder": ENCODER, "decoder": DECODER},
    "beit": {"name": "beit", "encoder": BEIT, "mask": "random", "tokenizer": TOKENIZER},
    "igpt": {"name": "igpt", "encoder": GPT},
    "classify": {"name": "classify", "encoder": ENCODER, "classes": ["cat", "dog", "owl"]},
    "segment": {"name": "segment", "encoder": ENCODER, "classes": ["sky", "sea"]},
    "detect": {"name": "detect", "encoder": ENCODER, "classes": ["car", "bus"]},
    "simmim": {"name": "simmim", "encoder": ENCODER},
    "mpp": {"name": "mpp", "encoder": ENCODER, "target": "pixels"},
    "encoder": {"name": "encoder", "encoder": ENCODER},
    "dvae": {"name": "dvae", "encoder": TOKENIZER},
    "ae": {"name": "ae", "encoder": {"hidden": [16], "code": 8}},
}


def make(path: Path, method: str | dict, *, channels=3, size=(16, 16), dtype="uint8", **changes) -> Path:
    """A finished run with weights far from their initialisation, so that every tensor affects the outputs."""
    settings = (METHODS[method] if isinstance(method, str) else method) | changes
    mean, std = [100.0, 120.0, 140.0, 90.0][:channels], [50.0, 60.0, 70.0, 40.0][:channels]
    spec = ImageSpec(channels, size, dtype, tuple(mean), tuple(std))
    config = Config(recipe="mae_nano", method=parse_method(settings), data={"size": size, "source": "/secret/photos"})
    torch.manual_seed(0)
    network = config.build(spec)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.requires_grad and "target." not in name:
                parameter.add_(0.15 * torch.randn_like(parameter))
        if hasattr(network.encoder, "palette"):
            network.encoder.palette.copy_(255 * torch.rand(network.encoder.palette.shape))
    run = Run.create(path)
    plan = plan_of(config, spec, [1_500_000, 1_000_000], ())
    plan = plan.model_copy(update={"steps": 20, "num_images": 64})
    run.write("config.json", config.model_dump(mode="json"))
    run.write("plan.json", plan.model_dump(mode="json"))
    run.write("provenance.json", {"device": "a processor", "versions": {"torch": "2"}, "git": {"commit": "c0ffee"}})
    run.set_status("finished", 20, total=20)
    checkpoint.save(run, 20, network.state_dict(), {}, {"step": 20})
    return path


def some_images(*size: int) -> torch.Tensor:
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(7))


def tokens(encoder, images: torch.Tensor) -> torch.Tensor:
    found = encoder(images)
    return found.patches if found.cls is None else torch.cat([found.cls[:, None], found.patches], 1)


def far(one: torch.Tensor, other: torch.Tensor) -> float:
    assert one.shape == other.shape
    assert other.std() > 0.05
    return float((one - other).abs().max())


def normalised(images: torch.Tensor, encoder) -> torch.Tensor:
    return (images - encoder.mean[:, None, None]) / encoder.std[:, None, None]


class Attention(torch.nn.Module):
    def __init__(self, width, heads, beit, each, offsets):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = torch.nn.Linear(width, 3 * width, bias=not beit), torch.nn.Linear(width, width)
        if beit:
            self.q_bias, self.v_bias = (torch.nn.Parameter(torch.zeros(width)) for _ in "qv")
        if each:
            self.relative_position_bias_table = torch.nn.Parameter(torch.zeros(offsets, heads))

    def forward(self, x, table, index):
        bias = self.qkv.bias
        if bias is None:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        q, k, v = (x @ self.qkv.weight.T + bias).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT / q.shape[-1] ** 0.5
        table = getattr(self, "relative_position_bias_table", table)
        if table is not None:
            scores = scores + table[index].permute(2, 0, 1)
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Scale(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gamma = torch.nn.Parameter(torch.zeros(width))


class Block(torch.nn.Module):
    def __init__(self, width, heads, ratio, norm, scaled=False, beit=False, each=False, offsets=0):
        super().__init__()
        self.norm1, self.norm2 = norm(width), norm(width)
        self.attn = Attention(width, heads, beit, each, offsets)
        self.mlp = torch.nn.Module()
        self.mlp.fc1 = torch.nn.Linear(width, int(width * ratio))
        self.mlp.fc2 = torch.nn.Linear(int(width * ratio), width)
        if scaled and beit:
            self.gamma_1, self.gamma_2 = (torch.nn.Parameter(torch.zeros(width)) for _ in "12")
        elif scaled:
            self.ls1, self.ls2 = Scale(width), Scale(width)

    def forward(self, x, table=None, index=None):
        gains = [1.0, 1.0]
        if hasattr(self, "gamma_1"):
            gains = [self.gamma_1, self.gamma_2]
        elif hasattr(self, "ls1"):
            gains = [self.ls1.gamma, self.ls2.gamma]
        x = x + gains[0] * self.attn(self.norm1(x), table, index)
        return x + gains[1] * self.mlp.fc2(torch.nn.functional.gelu(self.mlp.fc1(self.norm2(x))))


class Theirs(torch.nn.Module):
    """Reimplementation of timm's VisionTransformer and Beit, and base class of official MAE's two classes.

    It tests names and outputs of exports where neither library is installed. `make` replaces timm.create_model.
    """

    def __init__(
        self, img_size, patch_size, in_chans, embed_dim, depth, num_heads, mlp_ratio, num_classes=0,
        global_pool="token", init_values=None, use_abs_pos_emb=True, use_rel_pos_bias=False,
        use_shared_rel_pos_bias=False, fc_norm=None,
        qkv_bias=True, pretrained=False, norm_layer=lambda width: torch.nn.LayerNorm(width, eps=1e-6), beit=False,
        norm_pix_loss=False, decoder_embed_dim=None, decoder_depth=0, decoder_num_heads=0,
    ):  # fmt: skip
        super().__init__()
        size, self.patch = ((side, side) if isinstance(side, int) else side for side in (img_size, patch_size))
        self.grid = size[0] // self.patch[0], size[1] // self.patch[1]
        count = self.grid[0] * self.grid[1]
        self.pooled, self.norm_pix_loss = global_pool in ("avg", True), norm_pix_loss
        self.patch_embed = torch.nn.Module()
        self.patch_embed.proj = torch.nn.Conv2d(in_chans, embed_dim, self.patch, self.patch)
        self.cls_token = torch.nn.Parameter(torch.zeros(1, 1, embed_dim))
        if use_abs_pos_emb:
            self.pos_embed = torch.nn.Parameter(torch.zeros(1, 1 + count, embed_dim))
        offsets = (2 * self.grid[0] - 1) * (2 * self.grid[1] - 1) + 3
        if use_shared_rel_pos_bias:
            self.rel_pos_bias = torch.nn.Module()
            self.rel_pos_bias.relative_position_bias_table = torch.nn.Parameter(torch.zeros(offsets, num_heads))
        self.blocks = torch.nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, norm_layer, bool(init_values), beit, use_rel_pos_bias, offsets)
            for _ in range(depth)
        )
        if self.pooled:
            self.fc_norm = norm_layer(embed_dim)
        else:
            self.norm = norm_layer(embed_dim)
        if num_classes:
            self.head = torch.nn.Linear(embed_dim, num_classes)
        if decoder_embed_dim:
            self.mask_token = torch.nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
            self.decoder_pos_embed = torch.nn.Parameter(torch.zeros(1, 1 + count, decoder_embed_dim))
            self.decoder_embed = torch.nn.Linear(embed_dim, decoder_embed_dim)
            self.decoder_blocks = torch.nn.ModuleList(
                Block(decoder_embed_dim, decoder_num_heads, mlp_ratio, norm_layer) for _ in range(decoder_depth)
            )
            self.decoder_norm = norm_layer(decoder_embed_dim)
            self.decoder_pred = torch.nn.Linear(decoder_embed_dim, self.patch[0] ** 2 * in_chans)

    @classmethod
    def make(cls, name, **options):
        assert name in ("vit_base_patch16_224", "beit_base_patch16_224")
        return cls(**options, beit=name.startswith("beit"))

    def index(self):
        """The index of BEiT's relative position for each pair of patches."""
        rows, cols = self.grid
        places = [(row, col) for row in range(rows) for col in range(cols)]
        last = (2 * rows - 1) * (2 * cols - 1)
        table = [[last + 2] + [last] * len(places)]
        for a in places:
            offsets = [(a[0] - b[0] + rows - 1) * (2 * cols - 1) + a[1] - b[1] + cols - 1 for b in places]
            table.append([last + 1, *offsets])
        return torch.tensor(table)

    def embedded(self, x):
        x = self.patch_embed.proj(x).flatten(2).mT
        return x + self.pos_embed[:, 1:] if hasattr(self, "pos_embed") else x

    def through(self, x):
        cls = self.cls_token + self.pos_embed[:, :1] if hasattr(self, "pos_embed") else self.cls_token
        x = torch.cat([cls.expand(len(x), -1, -1), x], 1)
        table = self.rel_pos_bias.relative_position_bias_table if hasattr(self, "rel_pos_bias") else None
        for block in self.blocks:
            x = block(x, table, self.index())
        return x if self.pooled else self.norm(x)

    def forward_features(self, x):
        return self.through(self.embedded(x))

    def forward(self, x):
        return self.head(self.fc_norm(self.forward_features(x)[:, 1:].mean(1)))


class OfficialViT(Theirs):
    """Reimplementation of models_vit.VisionTransformer, whose features are the class token."""

    def forward_features(self, x):
        return super().forward_features(x)[:, 0]

    def forward(self, x):
        return self.head(self.fc_norm(super().forward_features(x)[:, 1:].mean(1)))


class OfficialMAE(Theirs):
    """models_mae.MaskedAutoencoderViT."""

    def forward_encoder(self, x, ratio):
        x = self.embedded(x)
        order = torch.rand(x.shape[:2], generator=torch.Generator().manual_seed(3)).argsort(1)
        kept = int(x.shape[1] * (1 - ratio))
        back, mask = order.argsort(1), torch.ones(x.shape[:2])
        mask[:, :kept] = 0
        x = self.through(x.gather(1, order[:, :kept, None].expand(-1, -1, x.shape[2])))
        return x, mask.gather(1, back), back

    def forward_decoder(self, x, back):
        x = self.decoder_embed(x)
        tokens = self.mask_token.expand(len(x), back.shape[1] + 1 - x.shape[1], -1)
        y = torch.cat([x[:, 1:], tokens], 1).gather(1, back[..., None].expand(-1, -1, x.shape[2]))
        y = torch.cat([x[:, :1], y], 1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            y = block(y)
        return self.decoder_pred(self.decoder_norm(y))[:, 1:]

    def forward(self, x, ratio=0.75):
        found, mask, back = self.forward_encoder(x, ratio)
        guess = self.forward_decoder(found, back)
        p = self.patch[0]
        truth = x.unflatten(3, (-1, p)).unflatten(2, (-1, p)).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        if self.norm_pix_loss:
            truth = (truth - truth.mean(-1, keepdim=True)) / (truth.var(-1, keepdim=True) + 1e-6) ** 0.5
        return (((guess - truth) ** 2).mean(-1) * mask).sum() / mask.sum(), guess, mask


@pytest.fixture
def others(monkeypatch):
    """Install the reimplementations of official MAE as modules and, without the plugin real_timm, of timm."""
    import types

    timm, vit, mae = (types.ModuleType(name) for name in ("timm", "models_vit", "models_mae"))
    timm.create_model, vit.VisionTransformer, mae.MaskedAutoencoderViT = Theirs.make, OfficialViT, OfficialMAE
    for module in (vit, mae) if WITH_TIMM else (timm, vit, mae):
        monkeypatch.setitem(sys.modules, module.__name__, module)


def exported(tmp_path: Path, to: str, method, **changes) -> tuple[Path, dict]:
    run = make(tmp_path / "run", method, **changes)
    out = tmp_path / f"out{find_target(to).suffix}"
    summary = export_run(run, to, out)
    assert summary.tested.startswith("checked: "), summary.tested
    assert summary.difference <= 1e-5
    card = Path(summary.card)
    assert {path.name for path in tmp_path.iterdir()} == {
        "run",
        out.name,
        out.name if to.startswith("hf") else card.name,
    }
    return out, summary


def run_code(code: str) -> dict:
    """Run the Python code that a model card or a message contains."""
    names: dict = {}
    exec(code, names)
    return names


@torch.no_grad()
@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("mae", {}),
        ("mae", {"size": (16, 24), "channels": 1, "encoder": {**ENCODER, "mlp_ratio": 3.0, "layer_scale": 0.1}}),
        ("mpp", {"channels": 4, "encoder": {**ENCODER, "patch": (4, 8), "positions": "learned"}}),
        ("beit", {}),
        ("beit", {"size": (16, 24), "encoder": {**BEIT, "relative_bias": "each_block", "positions": "learned"}}),
        ("encoder", {"encoder": {**ENCODER, "positions": "absent"}}),
        ("encoder", {"encoder": {**ENCODER, "norm_eps": 1e-3}}),
    ],
)
def test_timm_computes_the_same_features(tmp_path, others, method, changes):
    out, summary = exported(tmp_path, "timm", method, **changes)
    encoder = load(tmp_path / "run").method.encoder
    model = run_code(summary.load)["model"]
    assert type(model).__module__.startswith("timm.") if WITH_TIMM else isinstance(model, Theirs)
    images = some_images(2, encoder.spec.channels, *encoder.spec.size)
    assert far(model.forward_features(normalised(images, encoder)), tokens(encoder, images)) < 1e-5
    assert not any(value.is_shared() for value in load_file(out).values())
    assert ("without the rest of" in " ".join(summary.notes)) == (method != "encoder")


@torch.no_grad()
@pytest.mark.parametrize("encoder", [ENCODER, BEIT])
def test_a_classifier_is_exported_to_timm_with_its_head(tmp_path, others, encoder):
    _, summary = exported(tmp_path, "timm", "classify", encoder=encoder, channels=1, size=(16, 24))
    method, images = load(tmp_path / "run").method, some_images(2, 1, 16, 24)
    model = run_code(summary.load)["model"]
    assert far(model(normalised(images, method.encoder)), method.logits(images)) < 1e-5
    assert "global_pool='avg'" in summary.load
    assert "norm.weight" not in model.state_dict()


@pytest.mark.skipif(WITH_TIMM, reason="this is the inner run")
def test_the_timm_tests_pass_with_the_real_timm():
    """Runs in a separate process, because transformers cannot be imported with this torchvision (real_timm.py)."""
    if not real_timm.installed():
        assert not os.environ.get("CI"), f"scripts/test installs timm into {real_timm.FOLDER}"
        pytest.skip(f"timm is not in {real_timm.FOLDER}; scripts/test installs it")
    tests = Path(real_timm.__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "real_timm", "-p", "no:cacheprovider", __file__, "-k",
               "timm_computes_the_same or to_timm_with_its_head"]  # fmt: skip
    done = subprocess.run(
        command, cwd=tests.parent, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), *filter(None, sys.path)])},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^9 passed", done.stdout, re.MULTILINE), done.stdout


@torch.no_grad()
@pytest.mark.parametrize("target", ["norm_pixels", "pixels"])
def test_official_mae_computes_the_same_prediction_and_loss_under_the_same_mask(tmp_path, others, target):
    out, summary = exported(tmp_path, "official", "mae", target=target)
    method, images = load(tmp_path / "run").method, some_images(3, 3, 16, 16)
    model = run_code(summary.load)["model"]
    loss, guess, mask = model(normalised(images, method.encoder), 0.75)
    order = mask.argsort(dim=1, stable=True)
    keep, drop = order[:, :4], order[:, 4:]
    patches = method.encoder.patches(images)
    ours = method.guess(patches, Mask(keep=keep, drop=drop))
    assert far(guess.gather(1, drop[..., None].expand(-1, -1, 48)), ours) < 1e-5
    truth = method.target(patches, images).gather(1, drop[..., None].expand(-1, -1, 48))
    assert float(method.target.loss(ours, truth)) == pytest.approx(float(loss), rel=1e-5)
    assert set(torch.load(out, weights_only=True)) == {"model", "unmask_imprint"}


@torch.no_grad()
def test_encoders_and_classifiers_are_exported_to_official_mae(tmp_path, others):
    for number, (method, changes, what) in enumerate(
        [
            ("simmim", {"size": (16, 24), "channels": 4}, "encoder only"),
            ("mae", {"size": (16, 24)}, "encoder only"),
            ("mae", {"channels": 1}, "encoder only"),
            ("mae", {"target": "pca"}, "encoder only"),
            ("mae", {"encoder": {**ENCODER, "mlp_ratio": 2.0}}, "encoder only"),
            ("classify", {}, "fine-tuned"),
        ]
    ):
        (tmp_path / str(number)).mkdir()
        out, summary = exported(tmp_path / str(number), "official", method, **changes)
        assert summary.what == f"official MAE, {what}"
        assert any("without the rest" in note for note in summary.notes) == (what == "encoder only")
        settings = ["method.encoder.heads=2", f"data.size={[*changes.get('size', (16, 16))]}"]
        if (channels := changes.get("channels", 3)) != 3:
            settings += [f"data.{key}={[1.0] * channels}" for key in ("mean", "std")]
        again = import_weights(out, tmp_path / f"{number}-again", settings=settings)
        ours, theirs = (load(path).method.state_dict() for path in (tmp_path / str(number) / "run", again.path))
        shared = [name for name in theirs if name.startswith("encoder.blocks")]
        assert len(shared) == 24
        assert all(torch.equal(ours[name], theirs[name]) for name in shared)


# transformers


@torch.no_grad()
@pytest.mark.parametrize(
    ("method", "changes", "kind"),
    [
        ("mae", {}, "ViTModel"),
        ("mae", {"channels": 1, "target": "pixels"}, "ViTModel"),
        ("mae", {"channels": 4, "size": (16, 24)}, "ViTModel"),
        ("mae", {"encoder": {**ENCODER, "norm_eps": 1e-3}}, "ViTModel"),
        ("mpp", {"encoder": {**ENCODER, "patch": (4, 8), "positions": "learned"}}, "ViTModel"),
        ("encoder", {"dtype": "uint16"}, "ViTModel"),
        ("mae", {"encoder": {**ENCODER, "layer_scale": 0.1}}, "BeitModel"),
        ("beit", {}, "BeitModel"),
        ("beit", {"encoder": {**ENCODER, "positions": "learned"}}, "ViTModel"),
        ("beit", {"target": "pixels", "tokenizer": None}, "BeitModel"),
        ("classify", {}, "BeitForImageClassification"),
        ("classify", {"encoder": {**BEIT, "relative_bias": "each_block"}}, "BeitForImageClassification"),
        ("classify", {"size": (16, 24)}, "ViTModel"),
        ("igpt", {}, "ImageGPTForCausalImageModeling"),
        ("encoder", {"encoder": GPT}, "ImageGPTModel"),
    ],
)
def test_transformers_computes_the_same_outputs(tmp_path, method, changes, kind):
    transformers = pytest.importorskip("transformers")
    out, summary = exported(tmp_path, "hf", method, **changes)
    assert summary.what == f"{kind} of transformers"
    assert json.loads((out / "config.json").read_text())["architectures"] == [kind]
    encoder, images = load(tmp_path / "run").method.encoder, None
    if kind.startswith("ImageGPT"):
        return
    images = some_images(2, encoder.spec.channels, *encoder.spec.size).to(DTYPES[encoder.spec.dtype])
    pixels = normalised(images.float(), encoder)
    if not kind.endswith("Model"):
        return  # these models return class scores, which `export_run` has compared
    named = run_code(summary.load.replace("AutoImageProcessor, ", "").replace("processor = ", "# "))["model"]
    with silence_libraries():
        auto = transformers.AutoModel.from_pretrained(out).eval()
    for model in (named, auto):
        first, again = (model(pixels).last_hidden_state for _ in range(2))
        assert torch.equal(first, again), "the output has no randomness"
        assert far(first, tokens(encoder, images)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize(
    ("method", "changes", "kind"),
    [
        ("mae", {}, "ViTMAEForPreTraining"),
        ("mae", {"channels": 1, "target": "pixels"}, "ViTMAEForPreTraining"),
        ("beit", {}, "BeitForMaskedImageModeling"),
        ("igpt", {}, "ImageGPTForCausalImageModeling"),
    ],
)
def test_hf_pretraining_exports_the_whole_method(tmp_path, method, changes, kind):
    transformers = pytest.importorskip("transformers")
    out, summary = exported(tmp_path, "hf-pretraining", method, **changes)
    assert summary.what == f"{kind} of transformers"
    if kind != "ViTMAEForPreTraining":
        return
    encoder = load(tmp_path / "run").method.encoder
    images = some_images(2, encoder.spec.channels, *encoder.spec.size)
    core = transformers.ViTMAEModel.from_pretrained(out, mask_ratio=0.0).eval()
    found = core(normalised(images, encoder), noise=torch.arange(16.0).expand(2, -1)).last_hidden_state
    assert far(found, tokens(encoder, images)) < 1e-5


@pytest.mark.parametrize(
    ("method", "changes", "said"),
    [
        ("simmim", {}, "no pre-training model for this run of simmim; use --to hf"),
        ("mae", {"channels": 4, "size": (16, 24)}, r"run of mae \(.*square.*\); use --to hf"),
        ("classify", {}, "no pre-training model"),
    ],
)
def test_hf_pretraining_rejects_methods_that_transformers_does_not_have(tmp_path, method, changes, said):
    with pytest.raises(ExportError, match=said):
        exported(tmp_path, "hf-pretraining", method, **changes)


def test_the_feature_pipeline_of_transformers_returns_all_tokens(tmp_path):
    transformers = pytest.importorskip("transformers")
    from PIL import Image

    out, _ = exported(tmp_path, "hf", "mae")
    encoder = load(tmp_path / "run").method.encoder
    images = some_images(1, 3, 16, 16)
    picture = Image.fromarray(images[0].permute(1, 2, 0).numpy())
    with silence_libraries():
        pipe = transformers.pipeline("image-feature-extraction", model=str(out), device="cpu")
        first, again = (torch.tensor(pipe(picture)) for _ in range(2))
    assert torch.equal(first, again)
    assert far(first, tokens(encoder, images).detach()) < 1e-5


@torch.no_grad()
def test_class_names_and_codes_in_transformers_match_the_run(tmp_path):
    transformers = pytest.importorskip("transformers")
    for name in ("c", "b", "g"):
        (tmp_path / name).mkdir()
    images = some_images(2, 3, 16, 16)
    out, _ = exported(tmp_path / "c", "hf", "classify")
    ours = load(tmp_path / "c" / "run").method
    model = transformers.AutoModelForImageClassification.from_pretrained(out).eval()
    assert far(model(normalised(images, ours.encoder)).logits, ours.logits(images)) < 1e-5
    assert model.config.id2label == {0: "cat", 1: "dog", 2: "owl"}
    out, _ = exported(tmp_path / "b", "hf-pretraining", "beit")
    ours = load(tmp_path / "b" / "run").method
    model = transformers.BeitForMaskedImageModeling.from_pretrained(out).eval()
    hidden = torch.zeros(2, 16, dtype=torch.bool)
    hidden[:, 4:10] = True
    order = hidden.int().argsort(dim=1, stable=True)
    guess = ours.guess(ours.encoder.patches(images), Mask(keep=order[:, :10], drop=order[:, 10:]))
    logits = model(normalised(images, ours.encoder), bool_masked_pos=hidden).logits
    assert far(logits[hidden].unflatten(0, (2, 6)), guess) < 1e-5
    out, _ = exported(tmp_path / "g", "hf", "igpt")
    ours = load(tmp_path / "g" / "run").method
    model = transformers.ImageGPTForCausalImageModeling.from_pretrained(out).eval()
    ids = ours.encoder.ids(images)
    given = torch.cat([torch.full((2, 1), 8), ids[:, :-1]], 1)
    assert far(model(input_ids=given).logits, ours.head(ours.encoder.run(ids))) < 1e-5
    clusters = np.array(json.loads((out / "preprocessor_config.json").read_text())["clusters"])
    assert np.abs(127.5 * (clusters + 1) - ours.encoder.palette.numpy()).max() < 1e-3


@torch.no_grad()
@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_the_preprocessor_of_transformers_normalises_like_the_encoder(tmp_path, channels, mode):
    transformers = pytest.importorskip("transformers")
    from PIL import Image

    out, _ = exported(tmp_path, "hf", "simmim", channels=channels)
    encoder = load(tmp_path / "run").method.encoder
    images = some_images(1, channels, 16, 16)
    picture = Image.fromarray(images[0].permute(1, 2, 0).numpy().squeeze(), mode)
    with silence_libraries():
        processor = transformers.AutoImageProcessor.from_pretrained(out)
    found = torch.from_numpy(np.asarray(processor(picture, return_tensors="np")["pixel_values"]))
    assert far(found, normalised(images, encoder)) < 1e-5


def test_exports_for_images_other_than_8_bit_have_no_preprocessor(tmp_path):
    for number, (method, dtype) in enumerate([("simmim", "uint16"), ("simmim", "float32"), ("igpt", "uint16")]):
        run, out = make(tmp_path / f"run{number}", method, dtype=dtype), tmp_path / f"out{number}"
        summary = export_run(run, "hf", out)
        assert "no preprocessor" in " ".join(summary.notes)
        assert not (out / "preprocessor_config.json").exists()
        assert (out / "palette.json").exists() == (method == "igpt")
        if method != "igpt":
            assert "mean 100, 120, 140; std 50, 60, 70" in (out / "README.md").read_text()


# Exports to ONNX and to unmask's safetensors


@torch.no_grad()
@pytest.mark.parametrize(
    ("method", "changes", "names"),
    [
        ("mae", {"encoder": {**ENCODER, "depth": 1}, "size": (16, 24), "channels": 1}, ["cls", "patches"]),
        ("classify", {"encoder": {**BEIT, "depth": 1}, "channels": 4}, ["cls", "patches", "logits"]),
        ("igpt", {"encoder": {**GPT, "depth": 1, "patch": (4, 2)}}, ["patches"]),
        ("dvae", {}, ["patches"]),
    ],
)
def test_the_onnx_graph_accepts_images_in_the_units_of_the_files_and_any_batch_size(tmp_path, method, changes, names):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    out, summary = exported(tmp_path, "onnx", method, **changes)
    for place in (check_export.__file__, torch.__file__):  # the traced code is in these folders
        assert str(Path(place).parent).encode() not in out.read_bytes()
    method = load(tmp_path / "run").method
    spec = method.encoder.spec
    for count in (1, 5):
        images = some_images(count, spec.channels, *spec.size)
        names_there = {"images": images.numpy()}
        exec(summary.load, names_there)
        found = [torch.from_numpy(names_there[name]) for name in names]
        ours = method.encoder(images)
        expected = [ours.patches] if ours.cls is None else [ours.cls, ours.patches]
        if len(names) == 3:
            expected.append(method.logits(images))
        assert all(far(one, other) < 1e-5 for one, other in zip(found, expected, strict=True))
    session = names_there["session"]
    assert [each.name for each in session.get_outputs()] == names
    assert session.get_inputs()[0].shape[1:] == [spec.channels, *spec.size]
    with pytest.raises(Exception, match=r"Unexpected input data type.*float.*uint8"):
        session.run(names, {"images": (images / 255).numpy()})
    told = json.loads(session.get_modelmeta().custom_metadata_map["unmask.input"])
    assert (told["dtype"], told["units"], told["normalised"]) == ("uint8", "0 to 255", False)


@torch.no_grad()
@pytest.mark.parametrize(("to", "dtype", "taken"), [("onnx-float", "uint8", "float"), ("onnx", "uint16", "uint16")])
def test_the_input_of_the_onnx_graph_has_the_dtype_of_the_files_or_float32(tmp_path, to, dtype, taken):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    out, summary = exported(tmp_path, to, "mae", dtype=dtype)
    assert summary.difference < 1e-4
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].type == f"tensor({taken})"


@pytest.mark.parametrize("method", ["mae", "beit", "igpt", "dvae", "classify", "encoder"])
def test_a_safetensors_export_restores_the_whole_method(tmp_path, method):
    out, summary = exported(tmp_path, "safetensors", method)
    again = run_code(summary.load)["method"]
    ours = load(tmp_path / "run").method
    assert type(again) is type(ours)
    assert again.encoder.spec == ours.encoder.spec
    assert not again.training
    assert ours.state_dict().keys() == again.state_dict().keys()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in ours.state_dict().items())
    assert b"/secret" not in out.read_bytes()


def test_header_and_card_contain_no_paths_of_this_machine(tmp_path):
    path, here = make(tmp_path / "run", "segment"), str(tmp_path)
    run, labelled, test = Run(path), f"{here}/images/train", f"{here}/images/val"
    config = run.read("config.json")
    config["data"] |= {
        "source": labelled, "annotations": f"{here}/masks/train", "test": test,
        "test_annotations": f"{here}/masks/val/", "test_split": f"{here}/lists/val.txt",
    }  # fmt: skip
    config["graft"] = [
        {"run": f"{here}/runs/pretrained", "source": "encoder.", "target": "encoder.", "step": 7},
        {"run": f"{here}/runs/tokenizer", "source": "", "target": "target.tokenizer.", "step": None},
    ]
    run.write("config.json", config)
    row = {"features": "pre-trained", "pool": "mean", "value": 0.41, "low": 0.3, "high": 0.5}
    other = row | {"features": f"{here}/runs/other"}
    for first in ("probe", "attentive", "targets", "curve"):
        probe = {"kind": "linear", "data": labelled, "test": test, "step": 20, "shots": None, "metric": "R2",
                 "task": "regression",
                 "targets": f"{here}/table.csv", "rows": [row, other], "shared": 3}  # fmt: skip
        run.write(f"evals/{first}-linear-train.json", probe)
    tuned = {"task": "segment", "metric": "mean_iou", "mean_iou": 0.5, "data": labelled,
             "test": f"a held-out fifth of {labelled}", "step": 20, "from": f"{here}/runs/pretrained"}  # fmt: skip
    run.write("evals/fine-tuned.json", tuned)
    export_run(path, "safetensors", out := tmp_path / "out.safetensors")
    with safe_open(out, "pt") as opened:
        header = json.loads(opened.metadata()["unmask"])
    places = {key: header["config"]["data"][key] for key in config["data"] if "test" in key or "anno" in key}
    assert places | {"source": header["config"]["data"]["source"]} == {
        "source": "train", "annotations": "train", "test": "val", "test_annotations": "val", "test_split": "val.txt",
    }  # fmt: skip
    assert [entry["run"] for entry in header["config"]["graft"]] == ["pretrained", "tokenizer"]
    assert [entry["target"] for entry in header["config"]["graft"]] == ["encoder.", "target.tokenizer."]
    assert here.encode() not in out.read_bytes()
    card = Path(f"{out}.md").read_text()
    assert here not in card
    careful = "regression of table.csv (careful: 3 test images are also training images)"
    assert card.count(f"{careful} | pre-trained, mean | 20 | R2 | 0.410 (0.300 to 0.500) |") == 4
    assert "other, mean" not in card, "the card has no scores of other runs"
    assert type(open_safetensors(out)).__name__ == "Segmenter"


@torch.no_grad()
@pytest.mark.parametrize(
    ("to", "method"),
    [
        ("timm", "mae"),
        ("official", "mae"),
        ("hf", "mae"),
        ("hf", "simmim"),
        ("timm", "classify"),
        ("official", "classify"),
    ],
)
def test_importing_an_export_restores_metadata_that_the_format_lacks(tmp_path, others, to, method):
    changes = {"encoder": {**ENCODER, "heads": 4}} | ({"target": "pixels"} if method == "mae" else {})
    run = Run(make(tmp_path / "run", method, **changes))
    config = run.read("config.json")
    config["data"]["crop"]["eval_share"] = 0.7
    run.write("config.json", config)
    export_run(run.path, to, out := tmp_path / f"out{find_target(to).suffix}")
    run.write("provenance.json", {"imported": {"licence": "only on Sundays", "kind": "?", "files": []}})
    again = import_weights(out, tmp_path / "again")
    before, after = load(tmp_path / "run"), load(again.path)
    assert after.plan.images == before.plan.images, "mean and std are not ImageNet's"
    assert after.config.data.crop.eval_share == before.config.data.crop.eval_share == 0.7
    ours, theirs = (each.config.method.model_dump()["encoder"] for each in (before, after))
    assert theirs | {"positions": 0} == ours | {"positions": 0}, "the heads too"
    images = some_images(2, 3, 16, 16)
    assert far(before.method.encoder(images).patches, after.method.encoder(images).patches) < 1e-6
    assert after.licence.startswith("not stated")
    if after.config.method.name == "mae":
        assert after.config.method.target == "pixels"
    if method == "classify":
        assert after.config.method.classes == ("cat", "dog", "owl")
    other = tmp_path / "with licence"
    other.mkdir()
    export_run(run.path, to, other / out.name)
    assert load(import_weights(other / out.name, tmp_path / "third").path).licence == "only on Sundays"


@pytest.mark.parametrize("to", ["timm", "official"])
def test_importing_an_export_restores_the_size_of_oblong_images(tmp_path, to):
    make(tmp_path / "run", "mae", size=(16, 24))
    export_run(tmp_path / "run", to, out := tmp_path / f"out{find_target(to).suffix}")
    again = load(import_weights(out, tmp_path / "again").path)
    assert again.plan.images.size == (16, 24)


@pytest.mark.parametrize("method", ["mae", "beit", "igpt", "segment"])
def test_a_safetensors_export_is_imported_with_all_its_settings(tmp_path, method):
    out, _ = exported(tmp_path, "safetensors", method)
    run = import_weights(out, tmp_path / "again")
    before, after = open_safetensors(out), load(run.path).method
    assert type(after) is type(before)
    assert after.state_dict().keys() == before.state_dict().keys()
    assert all(torch.equal(value, before.state_dict()[name]) for name, value in after.state_dict().items())
    assert read_config(run).method == read_config(Run(tmp_path / "run")).method
    assert load(run.path).licence.startswith("not stated")
    Run(tmp_path / "run").write(
        "provenance.json", {"imported": {"licence": "only on Sundays", "kind": "?", "files": []}}
    )
    (tmp_path / "bound").mkdir()
    export_run(tmp_path / "run", "safetensors", bound := tmp_path / "bound" / "out.safetensors")
    assert load(import_weights(bound, tmp_path / "bound" / "run").path).licence == "only on Sundays"
    with pytest.raises(UserError, match="with its own settings; leave it out"):
        import_weights(out, tmp_path / "other", settings=["data.mean=[0,0,0]"])
    weights = load_file(out)
    with safe_open(out, "pt") as opened:
        header = opened.metadata()
    gone, _ = weights.popitem()
    save_file(weights, tmp_path / "cut.safetensors", header)
    with pytest.raises(UserError, match=f"1 missing: {re.escape(gone)}"):
        import_weights(tmp_path / "cut.safetensors", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_open_safetensors_rejects_files_of_other_libraries(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    for name in ("other", "text"):
        with pytest.raises(UserError, match="was not written by `unmask export --to safetensors`"):
            open_safetensors(tmp_path / f"{name}.safetensors")
    with pytest.raises(UserError, match="is not a file"):
        open_safetensors(tmp_path / "none.safetensors")


# Rejected exports


@pytest.mark.parametrize(
    ("to", "method", "changes", "match"),
    [
        ("timm", "dvae", {}, "whose encoder is not a vision transformer, so timm has no model for it.*--to onnx"),
        ("timm", "igpt", {}, "--to safetensors, or hf"),
        ("official", "ae", {}, "official MAE has no model"),
        ("hf", "ae", {}, "transformers has no model"),
        (
            "official",
            "beit",
            {},
            "has a relative position bias and LayerScale and no position embeddings.*--to timm or --to hf",
        ),
        (
            "hf",
            "beit",
            {"size": (16, 24)},
            "is for images of 16 x 24 and has a relative .* only for squares; use --to timm",
        ),
        ("hf", "encoder", {"encoder": {**BEIT, "patch": (4, 8)}}, "is for patches of 4 x 8"),
        ("hf", "igpt", {"objective": "bert"}, "predicts hidden tokens"),
    ],
)
def test_runs_that_a_target_cannot_represent_are_rejected(tmp_path, to, method, changes, match):
    run = make(tmp_path / "run", method, **changes)
    with pytest.raises(ExportError, match=match):
        export_run(run, to, tmp_path / f"out{find_target(to).suffix}")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_existing_outputs_and_wrong_extensions_are_rejected(tmp_path):
    run = make(tmp_path / "run", "mae")
    (tmp_path / "taken.safetensors").touch()
    (tmp_path / "carded.safetensors.md").touch()
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.iterdir())
    for to, name, match in (
        ("timm", "taken.safetensors", "already exists and is not overwritten; choose another --out"),
        ("timm", "carded.safetensors", r"carded\.safetensors\.md already exists"),
        ("hf", "folder", "folder already exists"),
        ("timm", "weights.pth", r"expected a name that ends in \.safetensors"),
        ("official", "weights", r"a name that ends in \.pth"),
        ("hf", "nowhere/folder", "does not exist; create it"),
    ):
        with pytest.raises(ExportError, match=match):
            export_run(run, to, tmp_path / name)
    with pytest.raises(UserError, match="has no checkpoint of step 7"):
        export_run(run, "timm", tmp_path / "new.safetensors", step=7)
    with pytest.raises(UserError, match="is not a run"):
        export_run(tmp_path / "folder", "timm", tmp_path / "new.safetensors")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("fault", ["swapped", "nan"])
def test_an_export_with_different_outputs_is_removed(tmp_path, others, monkeypatch, fault):
    def broken(weights, right=tensor_names.to_official):
        state = right(weights)
        name = "blocks.0.mlp.fc1.bias"
        return state | {name: state[name].flip(0) if fault == "swapped" else state[name] * float("nan")}

    monkeypatch.setattr(tensor_names, "to_official", broken)
    run = make(tmp_path / "run", "mae")
    with pytest.raises(ExportFailed, match=r"loaded by timm, differs from the run by up to .* has been removed"):
        export_run(run, "timm", tmp_path / "out.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("to", ["timm", "hf", "onnx"])
def test_an_import_error_of_an_installed_library_is_reported_with_its_cause(tmp_path, monkeypatch, to):
    """The simulated cause is a torchvision for another version of torch; the export is kept."""
    name = {"timm": "timm", "hf": "transformers", "onnx": "onnxruntime"}[to]
    (tmp_path / "site" / name).mkdir(parents=True)
    (tmp_path / "site" / name / "__init__.py").write_text(
        "try:\n    raise RuntimeError('operator torchvision::nms does not exist\\nmore lines')\n"
        "except RuntimeError as error:\n    raise ImportError('Are the requirements defined?') from error\n"
    )
    for module in [one for one in sys.modules if one.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    run = make(tmp_path / "run", "mae")
    out = tmp_path / {"timm": "out.safetensors", "hf": "out", "onnx": "out.onnx"}[to]
    summary = export_run(run, to, out)
    assert summary.tested == (
        f"not checked: importing {name} failed with RuntimeError: operator torchvision::nms does not exist"
    )
    assert summary.difference is None
    assert out.exists()


def test_a_missing_library_is_reported_as_not_checked(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "timm", None)
    run = make(tmp_path / "run", "mae")
    summary = export_run(run, "timm", tmp_path / "out.safetensors", console=Console())
    assert (summary.difference, summary.tested) == (None, "not checked: timm is not installed")
    said = capsys.readouterr().err
    assert "not checked: timm is not installed" in said
    assert "timm.create_model('vit_base_patch16_224', pretrained=False, img_size=16, patch_size=4" in said
    assert "Not checked: timm is not installed." in (tmp_path / "out.safetensors.md").read_text()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"needs onnx, which is not installed.*unmask\[onnx\]"):
        export_run(run, "onnx", tmp_path / "out.onnx")
    assert not list(tmp_path.glob(".export-*"))


# The model card


def front_matter(card: str) -> dict[str, str]:
    """Return the single-line entries of a card's YAML."""
    _, top, _ = card.split("---\n", 2)
    return dict(re.findall(r"^(\w+): (.+)$", top, re.MULTILINE))


def test_the_card_describes_the_model_without_paths_of_this_machine(tmp_path):
    run = make(tmp_path / "run", "mae")
    row, data = {"pool": "mean", "accuracy": 0.625, "low": 0.5, "high": 0.75, "total": 8}, "/secret/labelled"
    probe = {
        "kind": "linear", "data": data, "test": f"a held-out fifth of {data}", "step": 20, "shots": 5,
        "rows": [row | {"features": "pre-trained"}, row | {"features": "/secret/runs/other"}],
    }  # fmt: skip
    points = [{"shots": n, "mean": 0.3, "low": 0.2, "high": 0.4, "accuracies": [0.3]} for n in (1, 5)]
    curve = {
        "kind": "knn", "data": data, "test": "/secret/test", "step": 20, "shots": [1, 5], "draws": 3,
        "rows": [{"features": "pre-trained", "pool": "cls", "points": points}],
    }  # fmt: skip
    scored = {
        "kind": "linear", "data": "x", "test": "y", "step": 20, "metric": "R2", "shots": None,
        "rows": [{"features": "pre-trained", "pool": "mean", "value": 0.41, "low": 0.3, "high": 0.5}],
    }  # fmt: skip
    for name, content in (("a", probe), ("b", curve), ("c", scored)):
        Run(run).write(f"evals/probe-{name}.json", content)
    Run(run).write("evals/fine-tuned.json", {"accuracy": 0.9, "low": 0.8, "high": 0.95, "step": 20,
                                             "data": "/secret/labelled", "test": "/secret/test"})  # fmt: skip
    out = tmp_path / "out.safetensors"
    export_run(run, "safetensors", out)
    card = Path(f"{out}.md").read_text()
    assert "secret" not in card
    assert str(tmp_path) not in card
    told = front_matter(card)
    assert (told["library_name"], told["license"], told["pipeline_tag"]) == (
        "unmask", "unknown", "image-feature-extraction",
    )  # fmt: skip
    for said in (
        '"Masked Autoencoders Are Scalable Vision Learners", He et al. 2021.', "Recipe: `mae_nano`.",
        "`photos`: 64 images, used at 16 x 16 pixels, 3 channels, uint8.", "20 of 20 steps, batch 256, 80 epochs.",
        "on a processor; seed 0", "Versions: torch 2", "Commit c0ffee.", "mean 100, 120, 140; std 50, 60, 70",
        "| Linear probe on labelled, tested on a held-out fifth of labelled, 5 labels per class | pre-trained, mean "
        "| 20 | accuracy | 62.5% (50.0% to 75.0%) |",
        "1 label per class, 3 random draws each | pre-trained, cls | 20 | accuracy, mean | 30.0% (20.0% to 40.0%) |",
        "| R2 | 0.410 (0.300 to 0.500) |",
        "| Fine-tuned on labelled for classification, tested on test | this model | 20 | accuracy | 90.0% (80.0% to "
        "95.0%) |",
        'open_safetensors("out.safetensors")', "## Licence of the weights\n\nNot stated",
        "Checked: unmask computes the same outputs up to 0.0e+00",
    ):  # fmt: skip
        assert said in card, said


def results(tmp_path: Path, method: str, files: dict[str, dict]) -> list[str]:
    """Return the rows of the results table in the card of a run with these files in `evals`."""
    run = make(tmp_path / "run", method)
    for name, content in files.items():
        Run(run).write(f"evals/{name}.json", content)
    summary = export_run(run, "safetensors", tmp_path / "out.safetensors")
    section = Path(summary.card).read_text().split("## Results\n\n")[1].split("\n\n##")[0]
    return section.splitlines()[2:]


TUNED = {"step": 20, "data": "/a/labelled", "test": "/a/test", "low": 0.41, "high": 0.61, "ap75": 0.1, "images": 9}
PROBED = {
    "shots": None,
    "data": "/a/labelled",
    "test": "a held-out fifth of /a/labelled",
    "step": 20,
    "task": "classes",
}
HELD = "on labelled, tested on a held-out fifth of labelled"


@pytest.mark.parametrize(
    ("task", "numbers", "rows"),
    [
        ("classify", {"metric": "accuracy", "accuracy": 0.51},
         ["for classification, tested on test | this model | 20 | accuracy | 51.0% (41.0% to 61.0%) |"]),
        ("segment", {"metric": "mean_iou", "mean_iou": 0.51, "pixel_accuracy": 0.8},
         ["for segmentation, tested on test | this model | 20 | mean IoU | 51.0% (41.0% to 61.0%) |",
          "for segmentation, tested on test | this model | 20 | pixel accuracy | 80.0% |"]),
        ("detect", {"metric": "ap50", "ap50": 0.51, "ap": 0.3, "low": None},
         ["for detection, tested on test | this model | 20 | AP50 | 51.0% |",
          "for detection, tested on test | this model | 20 | AP | 30.0% |"]),
    ],
)  # fmt: skip
def test_the_card_of_a_fine_tuned_run_has_the_metric_of_its_task(tmp_path, task, numbers, rows):
    found = results(tmp_path, task, {"fine-tuned": TUNED | {"task": task} | numbers})
    assert found == [f"| Fine-tuned on labelled {row}" for row in rows]


@pytest.mark.parametrize(
    ("name", "content", "rows"),
    [
        ("probe-knn-labelled",
         {"kind": "knn", "metric": "accuracy", "shots": 5,
          "rows": [{"features": "raw pixels", "pool": "pixels", "accuracy": 0.25, "low": 0.2, "high": 0.3}]},
         [f"k nearest neighbours {HELD}, 5 labels per class | raw pixels, pixels | 20 | accuracy | 25.0% (20.0% to "
          "30.0%) |"]),
        ("attentive-labelled",
         {"kind": "attentive", "metric": "accuracy", "layer": "best",
          "rows": [{"features": "pre-trained", "pool": "attentive", "accuracy": 0.0, "low": 0.0, "high": 0.1}]},
         [f"Attentive probe {HELD}, layer best | pre-trained, attentive | 20 | accuracy | 0.0% (0.0% to 10.0%) |"]),
        ("targets-linear-labelled-by-table-multilabel",
         {"kind": "linear", "metric": "mean average precision", "task": "multilabel", "targets": "/a/table.csv",
          "train_images": 1234, "test_images": 56,
          "rows": [{"features": name, "pool": "mean", "value": 0.41, "low": 0.3, "high": 0.5}
                   for name in ("pre-trained", "/a/runs/other")]},
         [f"Linear probe {HELD.replace(',', ' (1,234 images),')} (56 images), multilabel of table.csv | pre-trained, "
          "mean | 20 | mean average precision | 0.410 (0.300 to 0.500) |"]),
        ("curve-linear-labelled-1-5-shots",
         {"kind": "linear", "metric": "accuracy", "shots": [1, 5], "draws": 3, "rows": [
             {"features": "pre-trained", "pool": "cls", "points": [
                 {"shots": count, "mean": count / 10, "low": 0.1, "high": 0.5, "accuracies": [0.1]}
                 for count in (1, 5)]}]},
         [f"Linear probe {HELD}, {count}, 3 random draws each | pre-trained, cls | 20 | accuracy, mean | {mean}.0% "
          "(10.0% to 50.0%) |" for count, mean in (("1 label per class", 10), ("5 labels per class", 50))]),
    ],
)  # fmt: skip
def test_the_card_shows_every_kind_of_probe(tmp_path, name, content, rows):
    assert results(tmp_path, "mae", {name: PROBED | content}) == [f"| {row}" for row in rows]


def test_the_card_of_imported_weights_states_their_licence_and_origin(tmp_path, others):
    run = make(tmp_path / "run", "mae")
    export_run(run, "official", tmp_path / "mae.pth")
    published = torch.load(tmp_path / "mae.pth", weights_only=True)["model"]
    torch.save({"model": published}, tmp_path / "mae.pth")  # a file without unmask's metadata, as other tools write it
    again = import_weights(
        tmp_path / "mae.pth", tmp_path / "again", settings=["method.encoder.heads=2", "method.decoder.heads=2"]
    )
    summary = export_run(again.path, "timm", tmp_path / "timm.safetensors")
    card = Path(summary.card).read_text()
    assert front_matter(card)["license"] == "other"
    assert front_matter(card)["license_name"].startswith("'CC-BY-NC 4.0")
    assert "not trained here but imported: official MAE, full or visualise: ViT 2 x 32" in card
    assert re.search(
        r"The training images are not known: the weights were imported from `mae\.pth` \(SHA-256 [0-9a-f]{64}\)", card
    )
    assert "## Training\n\nThe weights were not trained with unmask." in card
    assert "CC-BY-NC 4.0 (facebookresearch/mae): not for commercial use." in card
    assert "Nothing was measured." in card


def test_the_loading_code_in_a_card_works_in_the_folder_of_the_exported_file(tmp_path, others, monkeypatch):
    out, _ = exported(tmp_path, "timm", "classify")
    card = Path(f"{out}.md").read_text()
    assert front_matter(card)["pipeline_tag"] == "image-classification"
    assert "3 classes: cat, dog, owl." in card
    monkeypatch.chdir(tmp_path)
    assert run_code(card.split("```python\n")[1].split("```")[0])["model"].head.out_features == 3


def test_the_export_command_writes_files_and_returns_exit_codes(tmp_path, others, monkeypatch, capsys):
    from unmask import commands

    run = make(tmp_path / "run", "mae")

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["unmask", "export", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            commands.main()
        return stop.value.code or 0, *capsys.readouterr()

    code, out, err = call(run, "--to", "timm", "--out", tmp_path / "a.safetensors", "--json")
    assert code == 0, err
    assert json.loads(out)["what"] == "VisionTransformer of timm"
    assert json.loads(out)["difference"] < 1e-5
    assert "checked: timm computes the same" in err
    code, _, err = call(run, "--to", "timm", "--out", tmp_path / "a.safetensors")
    assert (code, "already exists" in err) == (2, True)
    code, _, err = call(run, "--to", "timm", "--out", tmp_path / "b.safetensors", "--step", 3)
    assert (code, "has no checkpoint of step 3" in err) == (2, True)
    monkeypatch.setattr(check_export, "TOLERANCE", -1)
    code, _, err = call(run, "--to", "timm", "--out", tmp_path / "b.safetensors")
    assert (code, "has been removed" in err, "Traceback" in err) == (1, True, False)
    assert not list(tmp_path.glob("b.*"))


@torch.no_grad()
@pytest.mark.parametrize(
    ("to", "method", "changes"),
    [
        ("hf", "mae", {}), ("hf-pretraining", "mae", {}), ("hf-pretraining", "beit", {}), ("hf", "beit", {}),
        ("hf", "igpt", {}), ("hf", "classify", {}), ("timm", "beit", {}),
        ("hf", "mpp", {"size": (16, 24)}), ("timm", "classify", {}), ("official", "mae", {}),
        ("official", "mpp", {"size": (16, 24)}),
    ],
)  # fmt: skip
def test_exported_files_can_be_imported(tmp_path, others, to, method, changes):
    out, _ = exported(tmp_path, to, method, **changes)
    ours = load(tmp_path / "run")
    hf = to.startswith("hf")
    settings = [] if hf else ["method.encoder.heads=2", *["method.decoder.heads=2"] * (method == "mae")]
    if not hf:
        settings += [f"data.{key}={[*getattr(ours.plan.images, key)]}" for key in ("mean", "std", "size")]
    theirs = load(import_weights(out, tmp_path / "again", settings=settings).path)
    images = some_images(2, 3, *ours.plan.images.size)
    assert theirs.plan.images.size == ours.plan.images.size
    if method == "classify":
        assert far(theirs.method.logits(images), ours.method.logits(images)) < 1e-5
    else:
        assert far(tokens(theirs.method.encoder, images), tokens(ours.method.encoder, images)) < 1e-5
    found = theirs.config.method.encoder, ours.config.method.encoder
    assert method in ("igpt", "classify") or found[0].relative_bias == found[1].relative_bias
    whole = (method == "mae" and to != "hf") or (method, to) in (
        ("igpt", "hf"), ("classify", "hf"), ("classify", "timm"),
    )  # fmt: skip
    assert (theirs.config.method.name == method) == whole
