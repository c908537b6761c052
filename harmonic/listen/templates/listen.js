"use strict";

const find = id => document.getElementById(id);
const stage = document.querySelector(".stage");
const rate = Number(stage.dataset.rate);
const here = new URL(".", location.href);
const PAST = 60 * rate;  // samples that can be saved
const SHOWN = 8;            // seconds on the screen
const LATER = 0.15;         // seconds from what is heard to where new settings act
// Seconds that are made ahead, and that must be there before it plays: little where the model is fast enough.
const FAST = { ahead: 4, need: 0.6 }, SLOW = { ahead: 9, need: 4 };

let socket = null, id = null, stream = 0, lead = 0;
let context = null, node = null, analyser = null;
let wanted = false, flowing = false, heardAny = false, promptReady = false;
let position = 0, asked = 0, ahead = 0, starved = 0, total = 0;
let cost = 0;  // seconds that a second of sound takes to make, over the last ones
const past = new Float32Array(PAST);
const waves = { low: new Float32Array(2048), high: new Float32Array(2048), given: new Uint8Array(2048), at: 0 };

// What is said.

function problem(text) {
  find("problem").hidden = !text;
  find("problem").textContent = text ? text[0].toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".") : "";
}

function state() {
  if (!socket) return wanted ? "connecting" : "idle";
  if (socket.readyState !== WebSocket.OPEN) return "connecting";
  if (!wanted) return "paused";
  if (!stream) return "beginning";
  return flowing ? "playing" : "buffering";
}

function show() {
  const now = state(), slow = cost > 1, speed = cost && 1 / cost;
  const pace = slow ? `This model makes ${speed.toFixed(2)} seconds of sound a second, slower than it plays: ` : "";
  const text = {
    idle: heardAny ? "Press play for another stream." : "Press play.",
    connecting: "Connecting…",
    beginning: promptReady ? "Reading the prompt…" : "Beginning…",
    paused: "Paused.",
    playing: slow ? `${pace}it will stop to buffer.` : "Playing.",
    buffering: slow ? `${pace}buffering, ${ahead.toFixed(1)} of ${SLOW.need} s.` : "Buffering…",
  }[now];
  if (find("status").textContent !== text) find("status").textContent = text;
  find("play").setAttribute("aria-pressed", wanted);
  find("play").lastElementChild.textContent = wanted ? "Pause" : "Play";
  find("speed").textContent = speed ? `${speed.toFixed(speed < 10 ? 1 : 0)}×` : "–";
  find("ahead").textContent = stream ? `${Math.max(0, ahead).toFixed(1)} s` : "–";
  const seconds = Math.floor(total / rate);
  find("heard").textContent = `${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, "0")}`;
  find("starved").textContent = starved;
  find("save").disabled = !total;
  Object.assign(document.documentElement.dataset, { state: now, starved, total, speed, ahead, stream, position });
}

// The connection.

const pause = seconds => new Promise(done => setTimeout(done, 1000 * seconds));

function connect() {
  if (socket) return socket.ready;
  const address = new URL("stream", here);
  address.protocol = address.protocol.replace("http", "ws");
  const opened = socket = new WebSocket(address);
  let greeted = false;
  opened.binaryType = "arraybuffer";
  opened.ready = new Promise((done, failed) => {
    opened.onmessage = ({ data }) => {
      if (typeof data !== "string") return take(data);
      const message = JSON.parse(data);
      if (message.type === "hello") {
        greeted = true;
        id = message.id;
        done();
      } else if (message.type === "begins") {
        ({ stream, lead } = message);
        position = asked = ahead = 0;
        node?.port.postMessage({ stream });
        ask();
      } else {
        problem(message.message);
        failed(new Error(message.message));
      }
    };
    opened.onclose = ({ reason }) => {
      if (socket !== opened) return;
      socket = id = null;
      stream = 0;
      wanted = promptReady = false;
      promptIs("");
      if (reason) problem(reason);
      else if (greeted) problem("The server has gone. Start its command again, then press play");
      else if (find("problem").hidden) problem("The server does not answer. Is its command still running?");
      failed(new Error("closed"));
      show();
    };
  });
  opened.ready.catch(() => {});
  show();
  return opened.ready;
}

function send(message) {
  if (socket?.readyState === WebSocket.OPEN) socket.send(JSON.stringify(message));
}

function take(data) {
  const view = new DataView(data);
  if (view.getUint32(0, true) !== stream || !node) return;
  const place = view.getUint32(4, true), seconds = view.getFloat32(8, true);
  const whole = new Int16Array(data, 12), samples = new Float32Array(whole.length);
  for (let i = 0; i < whole.length; i++) samples[i] = whole[i] / 32768;
  if (seconds) {
    const now = seconds * rate / whole.length;
    cost = cost ? 0.93 * cost + 0.07 * now : now;
  }
  ahead = (place + samples.length - position) / rate;
  node.port.postMessage({ position: place, samples, need: pace().need * rate }, [samples.buffer]);
  ask();
  show();
}

// After each interruption it waits for more.
function pace() {
  return cost > 1 ? SLOW : { ...FAST, need: Math.min(FAST.need * 2 ** starved, FAST.ahead - 1) };
}

function ask() {
  const until = Math.round(position + pace().ahead * rate);
  if (stream && until >= asked + rate / 10) {
    asked = until;
    send({ type: "ask", stream, until, played: position });
  }
}

// Settings act on what is heard a moment later: what was made ahead from there on is made again. Where the model is too
// slow for that, they act on what it makes next.
let settled = 0, settling = null;  // when they were sent, in ms; and the timer of those that are not sent yet
function settle() {
  settling ??= setTimeout(() => {
    settling = null;
    settled = performance.now();
    sendSettings();
  }, Math.max(0, settled + 80 - performance.now()));
}

function sendSettings() {
  const start = cost > 1 ? 2 ** 31 - 1 : Math.round(position + LATER * rate);
  send({ type: "settings", stream, start, temperature: Number(find("temperature").value),
    top_p: Number(find("top_p").value) });
  asked = Math.min(asked, start);
}

function begin() {
  const seed = Math.min(Math.max(Math.round(Number(find("seed").value)) || 0, 0), 2 ** 31 - 1);
  find("seed").value = seed;
  sendSettings();
  send({ type: "begin", seed, prompt: promptReady });
  stream = 0;  // until the server says its number: what comes of the old one is not played
  flowing = false;
  node?.port.postMessage({ stream });
}

// Sound.

async function listen() {
  if (context) return context.resume();
  if (!window.isSecureContext)
    throw new Error("browsers play generated sound only for pages of this machine or over https: reach the server " +
      `through a tunnel, as ssh -L ${location.port}:127.0.0.1:${location.port} ${location.hostname}`);
  if (!window.AudioWorkletNode) throw new Error("this browser has no AudioWorklet, which plays the stream; use another");
  try {
    context = new AudioContext({ sampleRate: rate });
  } catch {
    throw new Error(`this browser cannot play sound of ${rate} Hz; use another`);
  }
  await context.audioWorklet.addModule(new URL("player.js", here));
  node = new AudioWorkletNode(context, "player", { numberOfInputs: 0, outputChannelCount: [1] });
  analyser = new AnalyserNode(context, { fftSize: 1024, smoothingTimeConstant: 0, minDecibels: -100, maxDecibels: -20 });
  node.connect(analyser).connect(context.destination);
  node.port.onmessage = ({ data }) => heard(data);
  await context.resume();
}

function heard(data) {
  for (const sample of data.samples) past[total++ % PAST] = sample;
  wave(data.samples, data.stream === stream && data.position <= lead);
  heardAny ||= data.samples.length > 0;
  if (!stream || data.stream !== stream) return;
  position = data.position;
  ahead = data.ahead / rate;
  if (flowing && !data.flowing && wanted) starved++;
  flowing = data.flowing;
  ask();
  show();
}

// Plays on, or with `fresh` from a new beginning.
async function play(fresh) {
  problem("");
  wanted = true;
  show();
  try {
    await listen();
    await connect();
    if (fresh || !stream) begin();
  } catch (error) {
    wanted = false;
    if (error.message !== "closed") problem(error.message);
  }
  show();
}

async function halt() {
  wanted = false;
  await context?.suspend();
  show();
}

find("play").onclick = () => (wanted ? halt() : play(false));
find("again").onclick = () => {
  find("seed").value = Math.floor(Math.random() * 2 ** 31);
  play(true);
};
find("seed").onchange = () => play(true);
for (const name of ["temperature", "top_p"]) {
  find(name).oninput = () => {
    find(`${name}-is`).textContent = Number(find(name).value).toFixed(2);
    settle();
  };
}

// Prompts.

function promptIs(text) {
  find("prompt").textContent = text || `Sound that the stream continues, at most ${stage.dataset.seconds} seconds.`;
  find("forget").hidden = !promptReady;
}

async function give(name, content) {
  problem("");
  const most = Number(stage.dataset.megabytes);
  if (content.size > most * 1e6)
    return problem(`the prompt has ${(content.size / 1e6).toFixed(1)} MB; give at most ${most} MB`);
  if (!content.size) return problem("the prompt is empty; give another file");
  find("prompt").textContent = `Reading ${name}…`;
  try {
    await connect();
    const answer = await fetch(new URL(`prompt/${id}`, here), { method: "POST", body: content });
    const said = await answer.json();
    if (!answer.ok) throw new Error(said.message);
    promptReady = true;
    promptIs(`Continues the last ${said.seconds.toFixed(1)} s of ${name}.`);
    await play(true);
  } catch (error) {
    promptIs(promptReady ? "Continues the prompt before." : "");
    if (error.message !== "closed") problem(error instanceof TypeError ? "the server did not take the prompt" : error.message);
  }
}

find("open").onclick = () => find("file").click();
find("file").onchange = async () => {
  const [file] = find("file").files;
  if (file) await give(file.name, file);
  find("file").value = "";
};
find("forget").onclick = () => {
  promptReady = false;
  promptIs("");
};

let recorder = null;
find("record").onclick = async () => {
  if (recorder) return recorder.stop();
  problem("");
  try {
    await halt();
    const raw = { channelCount: 1, echoCancellation: false, noiseSuppression: false, autoGainControl: false };
    const source = await navigator.mediaDevices.getUserMedia({ audio: raw });
    const parts = [];
    recorder = new MediaRecorder(source);
    recorder.ondataavailable = ({ data }) => parts.push(data);
    recorder.onstop = async () => {
      recorder = null;
      find("record").setAttribute("aria-pressed", false);
      find("record").textContent = "Record";
      for (const track of source.getTracks()) track.stop();
      try {
        const bytes = await new Blob(parts).arrayBuffer();
        const sound = await new OfflineAudioContext(1, 1, rate).decodeAudioData(bytes);
        await give("the recording", wav(sound.getChannelData(0)));
      } catch {
        problem("the recording could not be read; record again");
      }
    };
    recorder.start();
    find("record").setAttribute("aria-pressed", true);
    find("record").textContent = "Stop recording";
    setTimeout(recorder => recorder.state === "recording" && recorder.stop(), 1000 * stage.dataset.seconds - 500, recorder);
  } catch (error) {
    problem(`there is no microphone that this page may use (${error.name}); allow it in the browser, or open a file`);
  }
};

// WAV files of 16-bit samples.

function wav(samples) {
  const view = new DataView(new ArrayBuffer(44 + 2 * samples.length));
  const text = (at, letters) => [...letters].forEach((letter, i) => view.setUint8(at + i, letter.charCodeAt(0)));
  text(0, "RIFF");
  view.setUint32(4, view.byteLength - 8, true);
  text(8, "WAVEfmt ");
  [[16, 16, 4], [20, 1, 2], [22, 1, 2], [24, rate, 4], [28, 2 * rate, 4], [32, 2, 2], [34, 16, 2]].forEach(
    ([at, value, size]) => view[`setUint${8 * size}`](at, value, true));
  text(36, "data");
  view.setUint32(40, 2 * samples.length, true);
  samples.forEach((sample, i) => {
    view.setInt16(44 + 2 * i, Math.max(-32768, Math.min(32767, Math.round(32768 * sample))), true);
  });
  return new Blob([view], { type: "audio/wav" });
}

find("save").onclick = () => {
  const length = Math.min(total, PAST), samples = new Float32Array(length);
  for (let i = 0; i < length; i++) samples[i] = past[(total - length + i) % PAST];
  const link = document.createElement("a");
  link.href = URL.createObjectURL(wav(samples));
  link.download = `${stage.dataset.name.replace(/[^\w.-]+/g, "_")}_last_minute.wav`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
};

// Pictures: a column of the waveform is so many samples, a column of the spectrogram so much time.

const COLUMNS = 640, PER_COLUMN = SHOWN * rate / COLUMNS, MELS = 128;
const palette = new Uint8ClampedArray(stage.dataset.palette.match(/../g).map(byte => parseInt(byte, 16)));

let left = 0;  // samples of the newest column that are to come

function wave(samples, given) {
  for (const sample of samples) {
    if (left <= 0) {
      waves.at++;
      left += PER_COLUMN;
      const i = waves.at % 2048;
      waves.low[i] = waves.high[i] = sample;
      waves.given[i] = given;
    }
    const i = waves.at % 2048;
    waves.low[i] = Math.min(waves.low[i], sample);
    waves.high[i] = Math.max(waves.high[i], sample);
    left--;
  }
}

function fit(canvas) {
  const scale = window.devicePixelRatio || 1;
  const width = Math.round(canvas.clientWidth * scale), height = Math.round(canvas.clientHeight * scale);
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  return canvas.getContext("2d");
}

function drawWave() {
  const canvas = find("waveform"), pen = fit(canvas), { width, height } = canvas;
  const style = getComputedStyle(document.documentElement);
  const colours = ["--accent", "--given", "--line"].map(name => style.getPropertyValue(name));
  pen.clearRect(0, 0, width, height);
  pen.fillStyle = colours[2];
  pen.fillRect(0, height / 2, width, 1);
  const edge = i => Math.round(width * (1 - i / COLUMNS));
  for (let i = 0; i < Math.min(COLUMNS, waves.at); i++) {
    const j = (waves.at - i) % 2048;
    const top = (1 - waves.high[j]) / 2 * height, bottom = (1 - waves.low[j]) / 2 * height;
    pen.fillStyle = colours[waves.given[j]];
    pen.fillRect(edge(i + 1), top, edge(i) - edge(i + 1), Math.max(1, bottom - top));
  }
}

const scroll = Object.assign(document.createElement("canvas"), { width: COLUMNS, height: MELS });
const inks = scroll.getContext("2d");
inks.fillStyle = "#000003";
inks.fillRect(0, 0, COLUMNS, MELS);
const mel = hertz => 2595 * Math.log10(1 + hertz / 700), hertz = mels => 700 * (10 ** (mels / 2595) - 1);
let drawn = 0;  // the context's time of the newest column

function drawSpectrogram() {
  const columns = Math.min(COLUMNS, Math.floor((context?.currentTime - drawn) * COLUMNS / SHOWN)) || 0;
  if (columns) drawn = flowing ? drawn + columns * SHOWN / COLUMNS : context.currentTime;
  if (flowing && columns) {
    const levels = new Uint8Array(analyser.frequencyBinCount);
    analyser.getByteFrequencyData(levels);
    const low = mel(40), step = (mel(rate / 2) - low) / MELS, bin = rate / 2 / levels.length;
    const strip = inks.createImageData(columns, MELS);
    for (let row = 0; row < MELS; row++) {
      const from = Math.floor(hertz(low + row * step) / bin);
      const to = Math.max(from + 1, Math.ceil(hertz(low + (row + 1) * step) / bin));
      const level = Math.max(...levels.subarray(from, to));
      for (let x = 0; x < columns; x++) {
        const place = 4 * ((MELS - 1 - row) * columns + x);
        strip.data.set(palette.subarray(3 * level, 3 * level + 3), place);
        strip.data[place + 3] = 255;
      }
    }
    inks.drawImage(scroll, -columns, 0);
    inks.putImageData(strip, COLUMNS - columns, 0);
  }
  const canvas = find("spectrogram"), pen = fit(canvas);
  pen.drawImage(scroll, 0, 0, canvas.width, canvas.height);
}

let shownSize = "", shownAt = 0;
function draw(now) {
  requestAnimationFrame(draw);
  if (now - shownAt < 35) return;  // pieces on their way to the audio thread come before pictures
  shownAt = now;
  const size = `${find("waveform").clientWidth} ${getComputedStyle(document.body).color}`;
  if (context?.state === "running" || size !== shownSize) {
    shownSize = size;
    drawWave();
    drawSpectrogram();
  }
}

find("oldest").textContent = `${SHOWN} s ago`;
find("frequencies").textContent = `40 Hz to ${(rate / 2000).toFixed(rate % 2000 ? 1 : 0)} kHz`;
show();
draw(performance.now());
