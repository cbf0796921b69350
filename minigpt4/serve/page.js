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
    document.querySelectorAll(".chat").forEach((chat) => chat.querySelectorAll(".message-row img").forEach((image, i) => {
      image.alt = say(`Image ${i + 1} of this chat`, `本次对话的第 ${i + 1} 张图片`);
    }));
    document.querySelectorAll(".example img").forEach((image) => { image.alt = ""; });  // the button has a text
    const textarea = $("#box textarea"), input = $("#box input[type=file]");
    if (textarea && !textarea.ariaLabel) {
      textarea.ariaLabel = textarea.placeholder;
      $("#status")?.setAttribute("role", "status");
      if (matchMedia("(pointer: fine)").matches) textarea.focus();
    }
    if (input) input.accept = "image/*";
    if (textarea) keepTyped(textarea);
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
  document.addEventListener("input", (event) => { if (event.target.matches("#box textarea")) keepTyped(event.target); });
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
