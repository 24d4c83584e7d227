"""Heads fitted to frozen features, without torch: what `mixmim head` does.

photos      labelled images, and what an engine makes of them
linear      logistic regression with a penalty and a temperature chosen on held-out images
quality     accuracy and calibration error
head        photos in, a head of the bundle out
"""
