"""Encoders in graphs and transforms of torch: torch.export with any batch and size, vmap, and rejected tracing."""

import warnings

import jaxtyping
import pytest
import torch

from unmask.batch import ImageSpec
from unmask.errors import UserError
from unmask.nn.vit import ViT, ViTConfig

SPEC = ImageSpec(3, (16, 16), "uint8", (120.0, 110.0, 100.0), (60.0, 50.0, 40.0))
KINDS = {
    "mae": {},
    "learned": {"positions": "learned"},
    "beit": {"positions": "absent", "relative_bias": True, "layer_scale": 0.1},
    "beit, fine-tuned": {"relative_bias": "each_block"},
}


def encoder_of(**changes) -> ViT:
    torch.manual_seed(0)
    encoder = ViT(ViTConfig(width=32, depth=1, heads=2, patch=(4, 4), **changes), SPEC).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return encoder


def images_of(*size: int) -> torch.Tensor:
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def untyped():
    """Disable the shape checks of the tests, which reject the symbolic sizes of graphs."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_torch_export_supports_any_batch_and_size(untyped, kind):
    encoder, any_size = encoder_of(**KINDS[kind]), torch.export.Dim.DYNAMIC
    program = torch.export.export(
        encoder, (images_of(2, 3, 24, 32),), dynamic_shapes={"images": {0: any_size, 2: any_size, 3: any_size}}
    )
    graph = program.module()
    for size in ((1, 3, 16, 16), (5, 3, 16, 16), (3, 3, 24, 32), (2, 3, 48, 12)):
        found, expected = graph(images_of(*size)), encoder(images_of(*size))
        assert tuple(found.grid) == expected.grid
        torch.testing.assert_close(found.patches, expected.patches, rtol=0, atol=1e-5)
        torch.testing.assert_close(found.cls, expected.cls, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_vmap_equals_a_loop(dtype):
    encoder, images = encoder_of(), images_of(3, 3, 16, 16).to(dtype)
    found = torch.vmap(lambda image: encoder(image[None]).patches[0])(images)
    torch.testing.assert_close(found, encoder(images).patches, rtol=0, atol=1e-5)


def test_tracing_is_rejected_because_it_would_fix_the_batch_size(tmp_path):
    encoder, images = encoder_of(), images_of(2, 3, 16, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(UserError, match=r"torch\.jit\.trace .* use torch\.export\.export\(encoder"):
            torch.jit.trace(encoder, images)
        with pytest.raises(UserError, match="unmask export RUN --to onnx"):
            torch.onnx.export(encoder, (images,), tmp_path / "traced.onnx", dynamo=False)


@torch.no_grad()
def test_an_exported_onnx_graph_supports_any_batch(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    encoder, images = encoder_of(), images_of(2, 3, 16, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            encoder, (images,), tmp_path / "encoder.onnx", dynamo=True, verbose=False, output_names=["cls", "patches"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
        )  # fmt: skip
    session = onnxruntime.InferenceSession(tmp_path / "encoder.onnx", providers=["CPUExecutionProvider"])
    images = images_of(5, 3, 16, 16)
    cls, patches = session.run(["cls", "patches"], {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(patches), encoder(images).patches, rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.from_numpy(cls), encoder(images).cls, rtol=0, atol=1e-4)
