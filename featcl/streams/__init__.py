"""Trajectories and streams of them, conversations as tokens, rollouts."""

from featcl.streams.chat import Chat, Encoded
from featcl.streams.readers import read_trajectories
from featcl.streams.trajectory import Trajectory
from featcl.streams.windows import Windows, encode_trajectory

__all__ = ["Chat", "Encoded", "Trajectory", "Windows", "encode_trajectory", "read_trajectories"]
