"""A series of patches: how it is read, applied, and written.

A patch is kept as `git format-patch -U0` writes it: a message, and no line of
upstream but those that change. Without context git puts a hunk where its line
numbers say, so a series fits the one release it was made for; `export()`
renders it with context, for people and for other releases.
"""

import ast
import dataclasses
import email
import email.policy
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib

HERE = pathlib.Path(__file__).resolve().parent
REPOSITORY = HERE.parent
PRISTINE = "pristine"
_AUTHOR = (
    "-c",
    "user.name=keras_nlp_cache developers",
    "-c",
    "user.email=keras_nlp_cache@users.noreply.github.com",
    "-c",
    "commit.gpgsign=false",
)
_HUNK = re.compile(r"^@@ -(\d+)", re.MULTILINE)


class DoesNotApply(Exception):
    """A patch and the sources it was applied to are not of one release."""


@dataclasses.dataclass(frozen=True)
class Series:
    """The patches to one project.

    Args:
        project: str. Its name in the package registry, and of the folder in
            which its patches are.
    """

    project: str

    @property
    def folder(self):
        return HERE / self.project

    @property
    def patches(self):
        """Paths of the patches, in order."""
        return sorted(self.folder.glob("*.patch"))

    @property
    def version(self):
        """The release that the series was made for, as it is pinned."""
        pins = (REPOSITORY / "constraints.txt").read_text()
        return re.search(rf"^{self.project}==(\S+)$", pins, re.MULTILINE).group(
            1
        )

    @property
    def generated(self):
        """Dictionary of the files that are generated from the package.

        From their paths in the project to their text.

        Raises:
            DoesNotApply: If a module is another than the one that
                `generated.diff` was made for.
        """
        path = self.folder / "generated.toml"
        if not path.exists():
            return {}
        modules = tomllib.loads(path.read_text())
        names = {
            module: path.removesuffix(".py").replace("/", ".")
            for kind in ("generated", "written")
            for module, path in modules[kind].items()
        }
        texts = _changed(modules["generated"], path.with_suffix(".diff"))
        return {
            path: generate(
                module, texts[module], names, modules["without"].get(module, ())
            )
            for module, path in modules["generated"].items()
        }

    def tree(self, into, version=None, progress=print):
        """Makes a git repository of the patched sources, a commit per patch.

        Args:
            into: Path of a folder to make.
            version: Optional str, a release other than the one that the series
                was made for. It is then applied with context.
            progress: Function that is told what is done.

        Returns:
            The path of the repository. Its tag `pristine` is the release.

        Raises:
            DoesNotApply: With file and hunk.
        """
        into = pathlib.Path(into)
        if version in (None, self.version):
            progress(f"{self.project} {self.version}: the sources")
            pristine_tree(self.project, self.version, into)
            return self.apply(into, progress)
        reference = self.tree(
            into.with_name(f"{into.name}-{self.version}"), progress=progress
        )
        with_context = into.with_name(f"{into.name}-patches")
        export(reference, with_context)
        pristine_tree(self.project, version, into)
        for patch in sorted(with_context.glob("*.patch")):
            progress(f"{self.project} {version}: {patch.name}")
            _apply(into, patch)
        return into

    def apply(self, tree, progress=print):
        """Commits the patches to a repository of the release; returns it."""
        for patch in self.patches:
            progress(f"{self.project}: {patch.name}")
            _apply(tree, patch, "--unidiff-zero")
        return tree

    def store(self, tree):
        """Writes the commits of a repository as the patches of the series."""
        self.folder.mkdir(exist_ok=True)
        for patch in self.patches:
            patch.unlink()
        export(tree, self.folder, "-U0", "--zero-commit")
        for patch in self.patches:
            # The version of git and the date say nothing of the patch.
            text = re.sub(r"(?m)^Date: .*\n", "", patch.read_text(), count=1)
            patch.write_text(text)

    def stale(self):
        """Paths of generated files whose patch is not what it should be."""
        text = "\n".join(patch.read_text() for patch in self.patches)
        return [
            path
            for path, expected in self.generated.items()
            if _added(text, path) != expected
        ]


def pristine_tree(project, version, into):
    """Makes a git repository of a release's source distribution."""
    into = pathlib.Path(into)
    into.mkdir(parents=True)
    download = into.with_name(f"{into.name}-download")
    _run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        + ["--no-binary", ":all:", "--dest", download, f"{project}=={version}"]
    )
    (archive,) = download.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(download, filter="data")
    (sources,) = (path for path in download.iterdir() if path.is_dir())
    into.rmdir()
    sources.rename(into)
    _commit_pristine(into, f"{project} {version}")


def installed_tree(package, into):
    """Makes a git repository of an installed package, without a network.

    Args:
        package: The imported package.
        into: Path of a folder to make. As an entry of `PYTHONPATH`, it stands
            for the package.
    """
    source = pathlib.Path(package.__file__).parent
    into = pathlib.Path(into)
    shutil.copytree(
        source,
        into / source.name,
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    _commit_pristine(into, f"{package.__name__} {package.__version__}")


def _commit_pristine(into, message):
    _git(into, "init", "--quiet", "--initial-branch=main")
    _git(into, "add", "--all", "--force")
    _git(into, "commit", "--quiet", f"--message={message}")
    _git(into, "tag", PRISTINE)


def export(tree, into, *options):
    """Writes the commits of a repository, each a file that `git am` takes."""
    _git(
        tree,
        "format-patch",
        "--quiet",
        "--no-stat",
        "--no-signature",
        "--no-numbered",
        "--full-index",
        *options,
        f"--output-directory={pathlib.Path(into).resolve()}",
        PRISTINE,
    )


def _changed(modules, diff):
    """The texts of modules of the package, after a diff of the package."""
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        files = {
            module: pathlib.Path(*module.split(".")).with_suffix(".py")
            for module in modules
        }
        for file in files.values():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / file, folder / file)
        # Within a repository around it, git would apply nothing, and say so to
        # nobody.
        _git(folder, "init", "--quiet")
        try:
            _git(folder, "apply", diff.resolve())
        except subprocess.CalledProcessError as e:
            raise DoesNotApply(_explain(diff, e.stderr)) from e
        return {
            module: (folder / file).read_text()
            for module, file in files.items()
        }


def generate(module, text, names, without=()):
    """The text of a module of the package, for a place in another project.

    Args:
        module: str, such as `"keras_nlp_cache.cache.layer_cache"`.
        text: str. What is in it.
        names: Dictionary from the names of modules of the package to those of
            the modules that stand for them in the project.
        without: Names of functions, classes and methods to leave out, such as
            `"LayerCache.update"`. Imports that nothing else uses go, too.
    """
    lines, imports = [], []
    if without:
        text = _leave_out(text, without)
    for line in text.splitlines(keepends=True):
        imported = re.match(
            r"(\s*)from (keras_nlp_cache\S*) import (.*)\n", line
        )
        if imported is None:
            lines += sorted(imports, key=str.casefold)
            lines.append(line.replace("keras_nlp_cache", "keras_hub"))
            imports = []
            continue
        if imported[2] not in names:
            raise ValueError(
                f"Expected all that {module} imports to be in the project, "
                f"too. Received: {imported[2]}, which is not in generated.toml."
            )
        indent, name, imported = imported.groups()
        imports.append(f"{indent}from {names[name]} import {imported}\n")
    return "".join(lines)


def _leave_out(text, names):
    """Python without some definitions, and the imports that they alone used."""
    lines, tree = text.splitlines(keepends=True), ast.parse(text)

    def drop(node, parent, first):
        lines[first - 1 : node.end_lineno] = [""] * (
            node.end_lineno - first + 1
        )
        parent.body.remove(node)

    for name in names:
        node = tree
        for part in name.split("."):
            parent, found = node, {getattr(x, "name", ""): x for x in node.body}
            if part not in found:
                raise ValueError(
                    "Expected what is to be left out to be there. Received: "
                    f"{name}, of which there is no {part}."
                )
            node = found[part]
        first = min(x.lineno for x in [node, *node.decorator_list])
        while not lines[first - 2].strip():
            first -= 1  # The blank lines before it.
        drop(node, parent, first)
    used = {x.id for x in ast.walk(tree) if isinstance(x, ast.Name)}
    for node in tree.body[:]:
        if isinstance(node, ast.Import | ast.ImportFrom):
            if used.isdisjoint(x.asname or x.name for x in node.names):
                drop(node, tree, node.lineno)
    return "".join(lines)


def _added(patches, path):
    """What patches add as a new file, or `None`."""
    start = patches.find(f"--- /dev/null\n+++ b/{path}\n")
    if start < 0:
        return None
    lines = patches[start:].splitlines(keepends=True)[3:]
    added = []
    for line in lines:
        if not line.startswith("+"):
            break
        added.append(line[1:])
    return "".join(added)


def _apply(tree, patch, *options):
    message = email.message_from_bytes(
        patch.read_bytes(), policy=email.policy.default
    )
    subject = message["subject"].removeprefix("[PATCH] ")
    body, *diff = re.split(
        r"^(?=diff --git )", message.get_content(), flags=re.M
    )
    if "--unidiff-zero" in options:
        _check_files(tree, patch, "".join(diff))
    try:
        _git(tree, "apply", "--index", *options, patch)
    except subprocess.CalledProcessError as e:
        raise DoesNotApply(_explain(patch, e.stderr)) from e
    _git(tree, "commit", "--quiet", f"--message={subject}\n\n{body}")


def _check_files(tree, patch, diff):
    """Raises `DoesNotApply` unless files are those that the patch is for."""
    for path, blob in re.findall(
        r"^diff --git a/(\S+) .*\nindex ([0-9a-f]+)\.\.", diff, re.M
    ):
        found = _git(tree, "rev-parse", f"HEAD:{path}").strip()
        if found != blob:
            raise DoesNotApply(
                f"{patch.name} does not apply:\n  {path} is another than in "
                "the release that the patch was made for"
            )


def _explain(patch, errors):
    """Names the files and hunks that git could not place."""
    found = re.findall(r"patch failed: (.+):(\d+)$", errors, re.MULTILINE)
    lines = [f"{patch.name} does not apply:"]
    for path, line in found:
        diff = patch.read_text().partition(f"+++ b/{path}\n")[2]
        diff = diff.partition("\ndiff --git ")[0]
        starts = [int(start) for start in _HUNK.findall(diff)]
        hunk = sum(start <= int(line) for start in starts)
        lines.append(f"  {path}, hunk {hunk} of {len(starts)}, line {line}")
    if not found:
        lines.append(errors.strip())
    return "\n".join(lines)


def _git(tree, *arguments):
    return _run(["git", *_AUTHOR, *arguments], cwd=tree)


def _run(command, **kwargs):
    return subprocess.run(
        [str(x) for x in command],
        check=True,
        capture_output=True,
        text=True,
        **kwargs,
    ).stdout


SERIES = {project: Series(project) for project in ("keras", "keras-hub")}
