"""What each route is for: the groups of `/docs`, and a description of every route."""

from __future__ import annotations

from mixmim_serve.service.options import Json

IMAGES, OPENAI, JOBS, MODEL, OPERATIONS, ABOUT = (
    "Images",
    "OpenAI clients",
    "Jobs",
    "Model",
    "Operations",
    "Documentation",
)

TAGS: list[Json] = [
    {
        "name": IMAGES,
        "description": "Send images, get vectors, classes, feature maps, scores or reconstructions. An image is a file "
        "`image` of a form, the body itself, or base64 in JSON. One image gives one flat answer; several give one "
        "entry each, and a bad one never affects the others.",
    },
    {
        "name": OPENAI,
        "description": "For unmodified OpenAI clients with `base_url` set to `http://HOST:PORT/v1`. The input is a "
        "data URI of an image instead of text.",
    },
    {
        "name": JOBS,
        "description": "Extract features of whole folders in the background. Off unless the server was started with "
        "`mixmim serve --jobs-root FOLDER`.",
    },
    {"name": MODEL, "description": "What is served."},
    {"name": OPERATIONS, "description": "For orchestrators and Prometheus; no API key needed."},
    {"name": ABOUT, "description": "This page and the document behind it; no API key needed."},
]

SCORE = (
    "The error of reconstructing the units that another photo covers, over fixed masks: the pretraining loss. "
    "0 is perfect; with normalised targets, 1 is what a plain grey unit gets.\n\n"
    "**A high score is not a defect.** Flat, plain or defective images can be easier to reconstruct than normal ones "
    "and then score lower: between intact and defective solar cells the shipped model's score had an AUROC of 0.40, "
    "worse than chance, where the distance to the nearest intact cells in stage-4 features had 0.87. To find unusual "
    "images, calibrate the bundle on normal ones and ask `/anomaly`. Scores compare only where `fingerprint` is the "
    "same."
)

# Of each route: its group, and the description below its summary.
PURPOSES: dict[tuple[str, str], tuple[str, str]] = {
    ("POST", "/embed"): (
        IMAGES,
        "One vector per image: the mean over the encoder's last feature map. Similar images have vectors with a high "
        "cosine. Vectors compare only where `fingerprint` is the same. As .npy, .npz or .safetensors with `Accept`.",
    ),
    ("POST", "/classify"): (
        IMAGES,
        "The most probable classes, best first, if the model has a classification head; 404 without one. A model may "
        "have several heads, each for other classes: `head`, in the URL or as a text field of the form, chooses one "
        "of those that `/model` lists. The classes are those that the head was trained on: any other image gets the "
        "least wrong of them. Binary formats hold the probabilities of all classes.",
    ),
    ("POST", "/features"): (
        IMAGES,
        "Feature maps before pooling, as (D, H, W) or as tokens (H * W, D): for segmentation, detection, or to compare "
        "images place by place. The answer is an .npz file unless `Accept` asks for JSON.",
    ),
    ("POST", "/score"): (IMAGES, SCORE),
    ("POST", "/anomaly"): (
        IMAGES,
        "For a bundle that `mixmim calibrate` has shown normal photos; 404 for any other. `score` is the distance from "
        "them, 0 for the median normal photo; `percentile` the share of normal photos that score lower, and `normal` "
        "whether the score is at most `threshold`, which normal photos exceed at the server's false-alarm rate. "
        "`map=true` adds the distance of each place, `overlay=true` a picture of it; with `Accept: image/png` that "
        "picture of one image is the whole answer.",
    ),
    ("POST", "/reconstruct"): (
        IMAGES,
        "Send two images. They are mixed in units of 32 x 32 pixels, and the network completes both. The answer is a "
        "PNG panel, or the arrays with `Accept`. 404 for a model without a decoder.",
    ),
    ("POST", "/embed/stream"): (
        IMAGES,
        "Thousands of images over one connection: send one line of JSON per image and read one line per image, in the "
        "same order, while you send. There is no limit on the length of the stream.",
    ),
    ("POST", "/v1/embeddings"): (
        OPENAI,
        "As OpenAI's route of this name, for images. `model` is the name of the served model, or one of its "
        "fingerprints. One bad image fails the whole request, because the format has no place for its error.",
    ),
    ("GET", "/v1/models"): (OPENAI, "A list with the one served model; `id` is what requests pass as `model`."),
    ("GET", "/v1/models/{name}"): (OPENAI, "The served model by its name or a fingerprint; 404 for any other."),
    ("POST", "/jobs"): (
        JOBS,
        "The source is a folder, list, pattern, tar or Parquet file below a root of the server. One job runs at a "
        "time, at idle priority. An equal job that has not ended is returned instead of a second one.",
    ),
    ("GET", "/jobs"): (JOBS, "With `id` one job, its progress and the files of its results; without it, a list."),
    ("DELETE", "/jobs"): (JOBS, "The job must have ended. Its results are deleted too, and nothing else ever is."),
    ("POST", "/jobs/cancel"): (JOBS, "The job stops after its current batch and can be resumed."),
    ("POST", "/jobs/resume"): (JOBS, "A cancelled or failed job continues where it stopped, with the same files."),
    ("GET", "/jobs/file"): (JOBS, "A file of the results by its name; supports ranges, so a download can resume."),
    ("GET", "/model"): (
        MODEL,
        "Name, network, preprocessing, heads with their classes and measured accuracies, engine with its measured "
        "agreement with torch, and both fingerprints: the model's, which `mixmim export` prints, and the engine's, "
        "which also covers runtime and precision.",
    ),
    ("GET", "/livez"): (OPERATIONS, "200 as long as the process answers; it says nothing about the model."),
    ("GET", "/healthz"): (OPERATIONS, "Another name of `/livez`."),
    ("GET", "/readyz"): (
        OPERATIONS,
        "200 while a known photo, sent through queue and engine within the last second, gets torch's embedding; 503 "
        "while the server starts, shuts down or computes wrong numbers.",
    ),
    ("GET", "/metrics"): (OPERATIONS, "Requests, images, queues, batches and times, to be scraped by Prometheus."),
    ("GET", "/openapi.json"): (ABOUT, "OpenAPI 3.1, for generators of clients and for tests."),
    ("GET", "/docs"): (ABOUT, "Swagger UI, served from this machine alone. `GET /` redirects here."),
}
