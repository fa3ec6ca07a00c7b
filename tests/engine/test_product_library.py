"""`unmask doctor` shows which library computes float32 products faster here."""

from unmask.console import Console
from unmask.engine import product_library
from unmask.engine.product_library import ProductRates, measure_products
from unmask.engine.self_test import run_self_test
from unmask.nn.linear_layer import mkl_is_slow


def test_both_libraries_are_measured():
    rates = measure_products()
    assert rates is not None
    assert min(rates.torch_gflops, rates.onednn_gflops) > 0.1
    assert rates.uses_onednn == mkl_is_slow()


def test_text_names_the_faster_library():
    assert "2.00 times): oneDNN is faster here; training uses oneDNN." in ProductRates(100.0, 200.0, True).text()
    assert "0.50 times): torch's default library is faster here; training uses torch's" in (
        ProductRates(200.0, 100.0, False).text()
    )


def test_torch_without_onednn_is_not_measured(monkeypatch):
    monkeypatch.setattr(product_library, "onednn_linear", lambda: None)
    assert measure_products() is None


def test_doctor_reports_the_rates(monkeypatch):
    console, lines = Console(quiet=True), []
    monkeypatch.setattr(console, "print", lines.append)
    good, summary = run_self_test(console)
    assert good
    assert summary["float32_products"]["onednn_gflops"] > 0
    assert any(line.startswith("float32 products: ") for line in lines)
