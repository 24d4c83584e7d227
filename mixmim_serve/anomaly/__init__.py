"""From a score to an alarm: what normal photos look like, and how far a photo is from that. Serves without torch.

patches      patch features from the encoder's stages, whitened
coreset      few of many vectors, so that each is near one that was kept
nearest      exact nearest neighbours in blocks
memory       what is remembered of normal photos, and the distances from it
rates        thresholds and rates from the scores of normal photos
calibration  all of it as one file of a bundle
calibrate    normal photos -> calibration
detector     engine outputs -> score, percentile, alarm
heatmap      distances of patches drawn over the photo
photos       the images of a source through the engine, in order
drift        a folder compared with the normal photos (SciPy)
page         that comparison as an HTML page
"""
