// What gradio does not do: language, labels, focus, drop and paste anywhere, a camera, and saving a chat.
(() => {
  const zh = navigator.language.toLowerCase().startsWith("zh");
  const say = (english, chinese) => (zh ? chinese : english);
  const $ = (selector) => document.querySelector(selector);
  document.documentElement.lang = zh ? "zh-CN" : "en";

  const LABELS = {  // of gradio's parts, which it has in English only
    "Upload a file": ["Add an image", "添加图片"],
    "Submit": ["Send", "发送"],
    "Stop": ["Stop", "停止"],
    "Remove file": ["Remove this image", "移除这张图片"],
    "Uploading": ["Uploading", "正在上传"],
    "Uploaded files": ["Added images", "已添加的图片"],
    "File thumbnail": ["Added image", "已添加的图片"],
    "Multimedia input field": ["Question and images", "问题与图片"],
    "Toggle Sidebar": ["Settings and saved chats", "设置与对话文件"],
    "Scroll down": ["Scroll to the end", "滚动到底部"],
    "Fullscreen": ["Full size", "全屏查看"],
    "Exit fullscreen mode": ["Leave the full size", "退出全屏"],
    "Reset to default value": ["Reset to the default", "恢复默认值"],
    "Close": ["Close", "关闭"],
    "Copy message": ["Copy", "复制"],
    "Copied message": ["Copied", "已复制"],
    "Liked": ["Liked", "已赞"],
    "Disliked": ["Disliked", "已踩"],
    "chatbot conversation": ["Chat", "对话"],
  };

  const TOASTS = {
    "Error": "出错了",
    "Warning": "请注意",
    "Connection to the server was lost. Attempting reconnection...": "与服务器的连接已断开，正在重新连接……",
  };

  const UPLOADED = ".message-row img:not(.grounded img)";  // boxes are drawn on the others

  let isTypedRestored = false;
  function keepTyped(textarea) {  // a reload of the page, which a restart of the server causes, empties the box
    const kept = sessionStorage.getItem("minigpt4-box");
    if (!isTypedRestored && kept && !textarea.value) {
      textarea.value = kept;
      textarea.dispatchEvent(new Event("input", { bubbles: true }));
    }
    isTypedRestored = true;
    if (textarea.value !== kept) sessionStorage.setItem("minigpt4-box", textarea.value);
  }

  function note(text) {
    const part = Object.assign(document.createElement("div"), { id: "note", role: "alert", textContent: text });
    $("#note")?.remove();
    document.body.append(part);
    setTimeout(() => part.remove(), 6000);
  }

  function improve() {
    for (const part of document.querySelectorAll("[aria-label]")) {
      const label = part.getAttribute("aria-label");
      const better = LABELS[label]?.[zh ? 1 : 0] ?? label
        .replace(/^(user|bot)'s message: /, (_, role) => (role === "user" ? say("You: ", "您：") : say("Answer: ", "回答：")))
        .replace("a component of type image", say("image", "图片"));
      if (better !== label) part.setAttribute("aria-label", better);
      if (better !== label && part.tagName === "BUTTON") part.title = better;
    }
    document.querySelectorAll(".chat").forEach((chat) => chat.querySelectorAll(UPLOADED).forEach((image, i) => {
      image.alt = say(`Image ${i + 1} of this chat`, `本次对话的第 ${i + 1} 张图片`);
    }));
    document.querySelectorAll(".example img").forEach((image) => { image.alt = ""; });  // the button has a text
    const textarea = $("#box textarea"), input = $("#box input[type=file]");
    if (textarea && !textarea.ariaLabel) {
      textarea.ariaLabel = textarea.placeholder;
      $("#status")?.setAttribute("role", "status");
      if (matchMedia("(pointer: fine)").matches) textarea.focus();
    }
    document.querySelectorAll(".chat .message textarea:not([data-plain])").forEach((area) => {  // has escaped HTML
      area.dataset.plain = "";
      area.value = area.value.replaceAll("&lt;", "<").replaceAll("&gt;", ">").replaceAll("&amp;", "&");
      area.dispatchEvent(new Event("input", { bubbles: true }));
    });
    if (input) input.accept = "image/*";
    if (textarea) keepTyped(textarea);
    if ($("#tasks") && textarea) showTask(textarea);
    for (const toasts of zh ? document.querySelectorAll(".toast-wrap") : []) {
      const texts = document.createTreeWalker(toasts, NodeFilter.SHOW_TEXT);
      while (texts.nextNode()) texts.currentNode.data = TOASTS[texts.currentNode.data.trim()] ?? texts.currentNode.data;
    }
    if (focused && !focused.checkVisibility() && document.activeElement === document.body) textarea?.focus();
    const link = $("#export a");
    if (link && !link.download) {  // the file of a chat is ready
      link.download = link.textContent;
      link.click();
    }
  }

  let focused = null, isDue = false;
  document.addEventListener("focusin", (event) => { focused = event.target; });
  document.addEventListener("input", (event) => { if (event.target.matches("#box textarea")) improve(); });
  new MutationObserver(() => {
    if (isDue) return;
    isDue = true;
    requestAnimationFrame(() => { isDue = false; improve(); });
  }).observe(document, { childList: true, subtree: true });

  const isImage = (file) => !file.type || file.type.startsWith("image/");  // some browsers do not know HEIC
  function addFiles(files) {
    const input = $("#box input[type=file]"), data = new DataTransfer();
    [...files].filter(isImage).forEach((file) => data.items.add(file));
    const other = [...files].find((file) => !isImage(file));
    if (other) note(say(`${other.name} is not an image.`, `${other.name} 不是图片。`));
    if (!input || !data.files.length) return;
    input.files = data.files;
    input.dispatchEvent(new Event("change", { bubbles: true }));
    $("#box textarea").focus();
  }

  const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
  const mark = (isDropping) => document.body.classList.toggle("dropping", isDropping);
  document.addEventListener("dragover", (event) => { if (hasFiles(event)) { event.preventDefault(); mark(true); } });
  document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) mark(false); });
  document.addEventListener("drop", (event) => {
    mark(false);
    if (!hasFiles(event) || event.target.closest("#open")) return;
    if (event.target.closest("#box") && [...event.dataTransfer.files].every(isImage)) return;
    event.preventDefault();
    event.stopPropagation();
    addFiles(event.dataTransfer.files);
  }, true);
  document.addEventListener("paste", (event) => {
    if (event.target.closest("#box textarea")) return;
    addFiles(event.clipboardData.files);
  });

  const TASKS = {  // of MiniGPT-v2: what choosing one writes into the box, and what it is for
    "": ["", "Ask anything.", "可随意提问。"],
    vqa: ["[vqa] ", "Ask a question; the answer is short.", "请输入问题，回答简短。"],
    grounding: ["[grounding] describe this image in detail", "A description with boxes.", "生成带框的描述。"],
    refer: ["[refer] ", "Name an object to get its box.", "请输入一个物体，得到它的框。"],
    detection: ["[detection] ", "Write a phrase to get the boxes of all its objects.", "请输入短语，框出其中所有物体。"],
    identify: ["[identify] what is this ", "Draw a box to ask what is in it.", "请画框，询问其中是什么。"],
    caption: ["[caption] Briefly describe this image.", "A short description.", "生成简短描述。"],
  };
  const TEXT_BOX = /\{<\d+><\d+><\d+><\d+>\}/, TAG = /^\[(\w+)\] ?/;
  const taskOf = (text) => text.match(TAG)?.[1] ?? "";

  function type(text) {
    const textarea = $("#box textarea");
    textarea.value = text;
    textarea.dispatchEvent(new Event("input", { bubbles: true }));
    textarea.focus();
  }

  function showTask(textarea) {
    const task = taskOf(textarea.value), toolbar = $("#tasks"), [, ...hint] = TASKS[task] ?? TASKS[""];
    if (!toolbar.ariaLabel) {
      [toolbar.role, toolbar.ariaLabel] = ["toolbar", say("Task", "任务")];
      toolbar.append(Object.assign(document.createElement("span"), { id: "task-hint" }));
    }
    document.querySelectorAll(".task").forEach((button) => {
      const own = button.id.slice(5);
      button.title = say(...TASKS[own].slice(1));
      button.ariaPressed = String(own === task);
    });
    if ($("#task-hint").textContent !== say(...hint)) $("#task-hint").textContent = say(...hint);
  }

  function chooseTask(task) {  // keeps what was typed beside the prompt of the task before
    const text = $("#box textarea").value, [before] = TASKS[taskOf(text)] ?? [""], [prompt] = TASKS[task];
    const rest = text.startsWith(before) ? text.slice(before.length) : text.replace(TAG, "");
    type(prompt + (rest && prompt && !prompt.endsWith(" ") ? " " : "") + rest);
  }

  function openDrawing() {
    const images = [...document.querySelectorAll(`#box .thumbnails img, #chat0 ${UPLOADED}`)];
    const source = images.findLast((image) => image.closest("#box")) ?? images.at(-1);
    if (!source) return note(say("Add an image first.", "请先添加图片。"));
    const dialog = Object.assign(document.createElement("dialog"), { id: "drawing" });
    dialog.setAttribute("aria-label", say("Draw a box", "画框"));
    const names = [["Left", "左"], ["Top", "上"], ["Right", "右"], ["Bottom", "下"]].map((name) => say(...name));
    dialog.innerHTML = `<p>${say("Draw with the mouse or a finger, or write hundredths of the sides.",
      "用鼠标或手指画框，或填写边长的百分之几。")}</p><section><img alt=""><i></i></section><div>${names.map((name) =>
      `<label>${name} <input type="number" min="0" max="100" step="1" required></label>`).join("")}</div>
      <div><button>${say("Ask about it", "询问框中内容")}</button><button>${say("Cancel", "取消")}</button></div>`;
    const [area, frame] = ["section", "i"].map((part) => dialog.querySelector(part));
    const inputs = [...dialog.querySelectorAll("input")], [ask, cancel] = dialog.querySelectorAll("button");
    dialog.querySelector("img").src = source.src;
    let start = null;
    const values = () => inputs.map((input) => (input.value === "" ? NaN : input.valueAsNumber));
    const show = () => {
      const [left, top, right, bottom] = values();
      ask.disabled = !(left < right && top < bottom && inputs.every((input) => input.checkValidity()));
      frame.hidden = ask.disabled;
      Object.assign(frame.style, { left: `${left}%`, top: `${top}%`, width: `${right - left}%`, height: `${bottom - top}%` });
    };
    const place = (event) => {  // in whole hundredths, as in the reference's mask
      const { left, top, width, height } = area.getBoundingClientRect();
      const parts = [(event.clientX - left) / width, (event.clientY - top) / height];
      return parts.map((part) => Math.min(99, Math.max(0, Math.floor(part * 100))));
    };
    area.ontouchstart = (event) => event.preventDefault();  // a stroke starts no fling, which would take the next tap
    area.onpointerdown = (event) => { start = place(event); area.setPointerCapture(event.pointerId); };
    area.onpointermove = (event) => {
      if (!start) return;
      const end = place(event);
      [Math.min, Math.max].forEach((pick, i) => start.forEach((from, j) => { inputs[2 * i + j].value = pick(from, end[j]); }));
      show();
    };
    area.onpointerup = area.onpointercancel = () => { start = null; };
    inputs.forEach((input) => { input.oninput = show; });
    dialog.addEventListener("close", () => dialog.remove());
    cancel.onclick = () => dialog.close();
    ask.onclick = () => {
      const box = `{<${values().join("><")}>}`, typed = $("#box textarea").value;
      const text = typed.replace(TAG, "").replace(TEXT_BOX, "").trim();
      dialog.close();
      type(`[identify] ${taskOf(typed) === "identify" && text ? text : "what is this"} ${box}`);
    };
    const open = () => {  // not before the image has its size, by which a box is measured
      if ($("#drawing")) return;
      document.body.append(dialog);
      dialog.showModal();
      show();
    };
    dialog.querySelector("img").decode().then(open, open);
  }
  document.addEventListener("click", (event) => {  // gradio would copy the HTML of an answer with boxes
    const copy = event.target.closest(`button[aria-label="${say("Copy", "复制")}"]`);
    const grounded = copy?.closest(".message-row")?.querySelector(".grounded p");
    if (!grounded) return;
    event.stopPropagation();
    navigator.clipboard.writeText(grounded.innerText);
  }, true);
  document.addEventListener("click", (event) => {
    const task = event.target.closest(".task");
    if (task) chooseTask(task.id.slice(5));
    if (event.target.closest("#draw")) openDrawing();
  });

  async function openCamera() {
    const dialog = document.createElement("dialog"), video = document.createElement("video");
    const buttons = document.createElement("div"), [take, cancel] = [0, 1].map(() => document.createElement("button"));
    let stream = null;
    dialog.id = "shot";
    dialog.setAttribute("aria-label", say("Take a photo", "拍照"));
    Object.assign(video, { muted: true, playsInline: true, autoplay: true });
    [take.textContent, cancel.textContent] = [say("Take the photo", "拍摄"), say("Cancel", "取消")];
    buttons.append(take, cancel);
    dialog.append(video, buttons);
    document.body.append(dialog);
    dialog.addEventListener("close", () => {
      stream?.getTracks().forEach((track) => track.stop());
      dialog.remove();
    });
    cancel.onclick = () => dialog.close();
    take.onclick = () => {
      const canvas = document.createElement("canvas");
      [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
      canvas.getContext("2d").drawImage(video, 0, 0);
      canvas.toBlob((blob) => addFiles([new File([blob], "photo.jpg", { type: "image/jpeg" })]), "image/jpeg", 0.92);
      dialog.close();
    };
    dialog.showModal();
    try {
      stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
      video.srcObject = stream;
    } catch (error) {
      take.disabled = true;
      video.replaceWith(say("The camera cannot be used: allow it in the browser.", "无法使用摄像头：请在浏览器中允许访问。"));
    }
  }
  document.addEventListener("click", (event) => { if (event.target.closest("#camera")) openCamera(); });
  document.addEventListener("DOMContentLoaded", () => {  // browsers offer cameras to https and localhost only
    if (!navigator.mediaDevices) document.body.classList.add("no-camera");
  });
})();
