"""A version in, its part of CHANGELOG.md out, and how to verify its image. Standard library only: it runs before an install."""

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VERIFY = """\
## Image

```
docker pull {image}
cosign verify {image} \\
  --certificate-identity-regexp '^https://github\\.com/{repository}/\\.github/workflows/release\\.yml@refs/tags/v' \\
  --certificate-oidc-issuer https://token.actions.githubusercontent.com
```
"""


def section(changelog: str, version: str) -> str:
    """Cut out what a changelog says about one version, without its heading.

    Raises:
        ValueError: there is no such heading, or nothing below it.
    """
    parts = re.split(r"^## +", changelog, flags=re.MULTILINE)[1:]
    for part in parts:
        heading, _, text = part.partition("\n")
        if re.match(rf"\[?v?{re.escape(version)}\]?(?=\s|$)", heading):
            # Links of headings stand at the end of the file.
            if notes := re.sub(r"^\[[^\]]+\]: \S+$", "", text, flags=re.MULTILINE).strip():
                return notes + "\n"
            raise ValueError(f"CHANGELOG.md says nothing about {version}; write it down below `## {heading}`")
    found = ", ".join(part.partition("\n")[0] for part in parts) or "no heading at all"
    raise ValueError(f"CHANGELOG.md has no `## {version}` (it has {found}); rename `## Unreleased`")


def check_version(root: Path, version: str) -> None:
    """Compare a tag with what the job says about itself.

    Raises:
        ValueError: they differ.
    """
    said = re.search(r'^__version__ = "(.+)"$', (root / "job/__init__.py").read_text("utf-8"), re.MULTILINE)
    if not said or said[1] != version:
        raise ValueError(f"job/__init__.py: __version__ is {said[1] if said else 'not there'}, and the tag says {version}")


def main() -> int:
    """Print the notes; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tag", help="v1.2.3")
    parser.add_argument("--image", help="ghcr.io/owner/name@sha256:...")
    parser.add_argument("--root", type=Path, default=ROOT)
    options = parser.parse_args()
    version = options.tag.removeprefix("v")
    try:
        check_version(options.root, version)
        print(section((options.root / "CHANGELOG.md").read_text("utf-8"), version))
    except ValueError as error:
        print(f"release notes: {error}", file=sys.stderr)
        return 2
    if options.image:
        repository = options.image.partition("@")[0].removeprefix("ghcr.io/")
        print(VERIFY.format(image=options.image, repository=repository.replace(".", r"\.")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
