"""
Hooks of mkdocs. The pages link to files of the repository (`../evals/results/...png`, `../recipes/...`), so
that they also read well there: figures are copied into the site, other files become links to the repository.
"""

import re
from pathlib import Path
from posixpath import normpath

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(!?\[[^\]]*\]\()((?:\.\./)+[^)\s#]+)")


def on_files(files, config):
    for figure in sorted((ROOT / "evals" / "results").rglob("*.png")):
        name = f"figures/{figure.relative_to(ROOT / 'evals' / 'results').as_posix()}"
        files.append(File.generated(config, name, abs_src_path=str(figure)))
    return files


def on_page_markdown(markdown, page, config, files):
    folder = Path(page.file.src_uri).parent.as_posix()

    def inside(match):
        target = normpath(f"docs/{folder}/{match[2]}")
        if target.startswith("docs/"):  # a page beside this one
            return match[0]
        if not (ROOT / target).exists():
            raise FileNotFoundError(f"{page.file.src_uri} links to {target}, which does not exist")
        if target.startswith("evals/results/") and target.endswith(".png"):
            up = "../" * page.file.src_uri.count("/")
            return f"{match[1]}{up}figures/{target.removeprefix('evals/results/')}"
        kind = "tree" if (ROOT / target).is_dir() else "blob"
        return f"{match[1]}{config['repo_url']}/{kind}/main/{target}"

    return LINK.sub(inside, markdown)
