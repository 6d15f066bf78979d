"""The file that configures a model's image processor: it goes along when the model is loaded and saved again.

Without it `pipeline` and `AutoImageProcessor` don't know the size, mean and standard deviation of the images.
"""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import RemoteEntryNotFoundError
from transformers.utils import logging

PROCESSOR_FILE = "preprocessor_config.json"

logger = logging.get_logger(__name__)


@dataclass
class ImageProcessorFile:
    """The image processor's configuration of a model that came from a folder or a Hub repository.

    Attributes:
        text: contents of the file; `None` if they are not known, or there is no such file.
        where: the arguments of `hf_hub_download` that get it, if it may be on the Hub and is not in the cache.
    """

    text: str | None
    where: dict | None = None

    @classmethod
    def beside(cls, name, commit: str | None, arguments: dict) -> "ImageProcessorFile":
        """Look in the folder or the cache, without a download, where `from_pretrained(name, **arguments)` does.

        `commit` is the revision that the model was loaded from, if it came from the Hub. A token is not kept.
        """
        subfolder = arguments.get("subfolder") or ""
        if Path(name).is_dir():
            path = Path(name, subfolder, PROCESSOR_FILE)
            return cls(path.read_text(encoding="utf-8") if path.is_file() else None)
        revision, cache_dir = commit or arguments.get("revision"), arguments.get("cache_dir")
        file = f"{subfolder}/{PROCESSOR_FILE}" if subfolder else PROCESSOR_FILE
        found = try_to_load_from_cache(str(name), file, cache_dir=cache_dir, revision=revision)
        if isinstance(found, str):
            return cls(Path(found).read_text(encoding="utf-8"))
        if found is not None or arguments.get("local_files_only"):  # the cache may know that there is no such file
            return cls(None)
        return cls(None, {"repo_id": str(name), "filename": file, "revision": revision, "cache_dir": cache_dir})

    def write(self, folder: Path) -> None:
        """Write the file into `folder`; the Hub is asked for it now, if it was not in the cache before."""
        if self.where is not None:
            self._fetch()
        if self.text is not None:
            (folder / PROCESSOR_FILE).write_text(self.text, encoding="utf-8")

    def _fetch(self) -> None:
        try:
            self.text = Path(hf_hub_download(**self.where)).read_text(encoding="utf-8")
        except RemoteEntryNotFoundError:
            pass  # the repository has no such file
        except OSError as error:  # no connection: the next save asks again
            logger.warning(
                "The image processor of %s could not be fetched, so that it is not saved with the model: save it there "
                "too, with AutoImageProcessor. (%s)", self.where["repo_id"], error,
            )  # fmt: skip
            return
        self.where = None


__all__ = ["ImageProcessorFile", "PROCESSOR_FILE"]
