"""Write predictions: COCO results and label maps for programs, pictures for people."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from mmengine_overlock.predict.drawing import Drawing
from mmengine_overlock.predict.pictures import RESULT_FOLDERS, RESULTS, Picture
from mmengine_overlock.predict.predictor import Predictor
from overlock.utils.errors import UserError
from overlock.utils.files import check_writable, whole_file

# Of the legend below a video.
_ROWS = 2


class Answers:
    """Writes predictions into a folder, one image after another; use it as a context.

    - A detector's boxes and masks go into `predictions.json`, in COCO's format of results with the names of files and
      classes beside the numbers; `category_id` is the label, from 0.
    - A segmenter's label maps go into `labels/NAME.png`, those of a video into `labels/VIDEO.mp4/FRAME.png`, and the
      names of the labels into `labels.json`.
    - Pictures go into `pictures/`, those of a video into a video.

    Images in several folders get the same folders here.

    What belongs to all images together is written at the end, also where the run breaks off.

    Args:
        folder: Made where it is missing.
        predictor: Where the predictions come from.
        root: The folder around all images and videos.
        draw: Whether to draw.

    Raises:
        UserError: If the folder cannot be written to or holds an earlier run, or OpenCV cannot write videos.
    """

    def __init__(self, folder: str | Path, predictor: Predictor, root: Path, draw: bool = True) -> None:
        self.folder, self.predictor, self.root = Path(folder).expanduser(), predictor, root
        check_writable(self.folder / 'predictions.json')
        if earlier := [name for name in (*RESULTS, *RESULT_FOLDERS) if (self.folder / name).exists()]:
            raise UserError(
                f'{folder} holds {" and ".join(earlier)} of an earlier run; give another folder, or delete them.'
            )
        self.results: list[dict[str, Any]] = []
        self.images = 0
        self.videos: dict[Path, cv2.VideoWriter] = {}
        self.drawing = Drawing(predictor.classes, predictor.palette) if draw else None
        self.names: dict[str, Path] = {}

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *error: object) -> None:
        for video in self.videos.values():
            video.release()
        detector = self.predictor.scope == 'mmdet'
        content: Any = self.results if detector else dict(enumerate(self.predictor.classes))
        with whole_file(self.folder / ('predictions.json' if detector else 'labels.json')) as file:
            file.write(json.dumps(content, ensure_ascii=False, indent=None if detector else 1).encode())

    def add(self, picture: Picture, sample: Any) -> None:
        """Write what was found in an image."""
        name = self._name(picture.source)
        if picture.frame is not None:
            name = f'{name}{picture.source.suffix}/{picture.frame:06d}'
        if 'pred_instances' in sample:
            self.results += self._boxes(picture, sample.pred_instances)
        else:
            width = np.uint8 if len(self.predictor.classes) <= 256 else np.uint16
            labels = sample.pred_sem_seg.data[0].cpu().numpy().astype(width)
            self._write(self.folder / 'labels' / f'{name}.png', labels)
        if self.drawing:
            # All frames of a video have one size.
            drawn = self.drawing(picture.pixels, sample, None if picture.frame is None else _ROWS)
            self._show(name, picture, drawn)
        self.images += 1

    def _name(self, source: Path) -> str:
        """Return a name for the files of an image or video: its own, with a number where another file has it too."""
        own, number = Path(os.path.relpath(source, self.root)).with_suffix('').as_posix(), 1
        while self.names.setdefault(name := own + f'_{number}' * (number > 1), source) != source:
            number += 1
        return name

    def _boxes(self, picture: Picture, found: Any) -> list[dict[str, Any]]:
        from pycocotools.mask import encode

        masks = found.get('masks')
        results = []
        for index, (box, score, label) in enumerate(
            zip(found.bboxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True)
        ):
            x1, y1, x2, y2 = box
            result = dict(
                image_id=self.images,
                file_name=str(picture.source),
                category_id=label,
                category_name=dict(enumerate(self.predictor.classes)).get(label, str(label)),
                bbox=[x1, y1, x2 - x1, y2 - y1],
                score=score,
            )
            if picture.frame is not None:
                result['frame'] = picture.frame
            if masks is not None:
                mask = encode(np.asfortranarray(masks[index].numpy().astype(np.uint8)))
                result['segmentation'] = dict(size=mask['size'], counts=mask['counts'].decode())
            results.append(result)
        return results

    def _show(self, name: str, picture: Picture, drawn: np.ndarray) -> None:
        folder = self.folder / 'pictures'
        if picture.frame is None:
            self._write(folder / f'{name}.jpg', drawn)
            return
        if picture.source not in self.videos:
            path = folder / f'{self._name(picture.source)}.mp4'
            path.parent.mkdir(parents=True, exist_ok=True)
            rate = cv2.VideoCapture(str(picture.source)).get(cv2.CAP_PROP_FPS) or 25
            code = cv2.VideoWriter.fourcc(*'mp4v')
            self.videos[picture.source] = cv2.VideoWriter(str(path), code, rate, drawn.shape[1::-1])
            if not self.videos[picture.source].isOpened():
                raise UserError(f'OpenCV cannot write the video {path}; draw nothing by --no-pictures.')
        self.videos[picture.source].write(drawn)

    @staticmethod
    def _write(path: Path, pixels: np.ndarray) -> None:
        written, content = cv2.imencode(path.suffix, pixels)
        if not written:
            raise UserError(
                f'OpenCV cannot write {path} of {pixels.shape[1]}x{pixels.shape[0]} pixels, as JPEG has at most 65500 '
                'a side; draw nothing by --no-pictures.'
            )
        with whole_file(path) as file:
            file.write(content.tobytes())
