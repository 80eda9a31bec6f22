"""What is generated from the code stays what the code says."""

import re
from pathlib import Path

from job.settings import RECIPES_DIR, default_run_id, read_settings
from job.settings.describe import env_example, settings_markdown

ROOT = Path(__file__).resolve().parent.parent


def test_env_example_is_what_the_settings_say() -> None:
    assert (ROOT / "env.example").read_text("utf-8") == env_example(), "run `make docs`"


def test_the_table_in_the_readme_is_what_the_settings_say() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    assert f"<!-- settings -->\n{settings_markdown()}<!-- /settings -->" in readme, "run `make docs`"


def test_env_example_with_every_line_uncommented_names_only_settings_that_exist(tmp_path: Path) -> None:
    lines = re.findall(r"^# ([A-Z0-9_]+=.*)$", env_example(), re.MULTILINE)
    given = [line for line in lines if not line.startswith("RECIPE=")]
    (tmp_path / "all.env").write_text("\n".join(given), "utf-8")
    environ = {"JOB_ENV_FILE": str(tmp_path / "all.env"), "MODEL_ID": "owner/model", "DATASETS": "owner/data"}
    defaults = read_settings({"MODEL_ID": "owner/model", "DATASETS": "owner/data"}, {}, folder=tmp_path)
    assert read_settings(environ, {}).settings == defaults.settings


def test_every_recipe_is_valid_and_says_what_it_is_for() -> None:
    recipes = sorted(RECIPES_DIR.glob("*.env"))
    assert recipes
    for recipe in recipes:
        assert recipe.read_text("utf-8").startswith("# "), recipe.name
        settings = read_settings({"RECIPE": recipe.stem}, {}, folder=ROOT).settings
        assert default_run_id(settings)
