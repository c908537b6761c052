"""A file system for Beam that is not local: `memory://...` stands for a bucket."""

import hashlib
import io

from apache_beam.io.filesystem import CompressionTypes, FileMetadata, FileSystem

FILES: dict[str, bytes] = {}


class MemoryFileSystem(FileSystem):
    """Like a bucket, it has no folders and no local paths. Importing this module registers it."""

    @classmethod
    def scheme(cls):
        return "memory"

    def join(self, basepath, *paths):
        return "/".join([basepath.rstrip("/"), *paths])

    def split(self, path):
        return path.rpartition("/")[::2]

    def mkdirs(self, path):
        pass

    def has_dirs(self):
        return False

    def _list(self, dir_or_prefix):
        for path in sorted(FILES):
            if path.startswith(dir_or_prefix):
                yield self.metadata(path)

    def create(self, path, mime_type="", compression_type=CompressionTypes.AUTO):
        class Upload(io.BytesIO):
            def close(self):
                if not self.closed:
                    FILES[path] = self.getvalue()
                super().close()

        return Upload()

    def open(self, path, mime_type="", compression_type=CompressionTypes.AUTO):
        return io.BytesIO(FILES[path])

    def copy(self, sources, destinations):
        for source, destination in zip(sources, destinations, strict=True):
            FILES[destination] = FILES[source]

    def rename(self, sources, destinations):
        self.copy(sources, destinations)
        for source in sources:
            del FILES[source]

    def exists(self, path):
        return path in FILES

    def size(self, path):
        return len(FILES[path])

    def last_updated(self, path):
        return 0

    def checksum(self, path):
        return hashlib.sha256(FILES[path]).hexdigest()

    def metadata(self, path):
        return FileMetadata(path, len(FILES[path]))

    def delete(self, paths):
        for path in paths:
            for name in [name for name in FILES if name == path or (path.endswith("/") and name.startswith(path))]:
                del FILES[name]
