"""Ships MathJax with the site, from an installed package: pages need no network."""

from importlib.metadata import distribution

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

_SOURCE = "sphinx-mathjax-offline/static/mathjax/tex-svg.js"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the renderer to the files of the site; called by mkdocs."""
    source = distribution("sphinx-mathjax-offline").locate_file(_SOURCE)
    files.append(File.generated(config, "javascripts/tex-svg.js", abs_src_path=str(source)))
    return files
