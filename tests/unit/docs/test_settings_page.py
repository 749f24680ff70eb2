"""`docs/settings.md` is what its script makes of the settings' docstrings, and every setting has one."""

import sys

from conftest import ROOT

from bt_ray.settings.config import SweepConfig

sys.path.insert(0, str(ROOT / "scripts"))

from write_settings_page import PAGE, SECTIONS, settings_page


def test_the_page_is_what_the_script_writes() -> None:
    assert PAGE.read_text() == settings_page(), "run python scripts/write_settings_page.py"


def test_every_setting_is_on_the_page_in_its_section() -> None:
    sections = dict(zip(["top", *SECTIONS], settings_page().split("\n## ")[1:], strict=False))
    assert {name for name in SweepConfig.model_fields if f"| `{name}` |" not in sections["top"]} == set(SECTIONS)
    for name, section in SECTIONS.items():
        assert [key for key in section.model_fields if f"| `{key}` |" not in sections[name]] == []
