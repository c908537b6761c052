const players = [...document.querySelectorAll("audio")];
for (const player of players) {
  const head = player.closest(".card").querySelector(".playhead");
  const move = () => {
    head.style.left = 100 * player.currentTime / player.duration + "%";
    if (!player.paused) requestAnimationFrame(move);
  };
  player.addEventListener("play", () => {
    for (const other of players) if (other !== player) other.pause();
    head.style.opacity = 1;
    move();
  });
  player.addEventListener("seeked", move);
}
